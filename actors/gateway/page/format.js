// Numbers as people read them.

/** 12,345. */
export const count = (value) => Math.round(value).toLocaleString("en");

/** 12.3k: for narrow places. */
export function short(value) {
  if (value < 1000) return String(Math.round(value));
  const [size, unit] = value < 1e6 ? [1e3, "k"] : [1e6, "M"];
  return `${(value / size).toFixed(value < 100 * size ? 1 : 0)}${unit}`;
}

/** A rate: 0.3, 12. */
export const rate = (value) => (value < 10 ? value.toFixed(1) : count(value));

/** Seconds in the unit that reads best. */
export function seconds(value) {
  if (value >= 10) return `${value.toFixed(1)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  if (value >= 0.001 || value === 0) return `${(value * 1e3).toFixed(value < 0.01 && value ? 1 : 0)} ms`;
  return `${(value * 1e6).toFixed(0)} µs`;
}

/** Bytes in the unit that reads best. */
export function bytes(value) {
  let size = value;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (size < 1024) return `${unit === "B" ? size.toFixed(0) : size.toFixed(size < 100 ? 1 : 0)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(1)} TiB`;
}

/** Bytes a second. */
export const speed = (value) => (value ? `${bytes(value)}/s` : "–");

export const percent = (share) => `${Math.round(100 * share)} %`;

/** The middle of some numbers; 0 of none. */
export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor((sorted.length - 1) / 2)] : 0;
}

export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");
