"""Traces: when requests arrive, and how long they are. Read from the formats in which traces are published, or made.

Whatever comes out is sorted by time, begins at zero and has at least one prompt and one answer token a request.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import TextIOWrapper
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

from joinwise.cluster.errors import ConfigError

#: Lengths from here on are mistakes.
MAX_TOKENS = 1 << 24


class Arrival(NamedTuple):
    """One request.

    Attributes:
        at: seconds since the trace began.
        prompt: prompt tokens, at least 1.
        output: answer tokens, at least 1.
        blocks: ids of the prompt's blocks, where the trace has them; an equal start is an equal prefix.
    """

    at: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests by time.

    Attributes:
        name: where it comes from.
        block_tokens: prompt tokens of one of `Arrival.blocks`; 0 where there are none.
    """

    name: str
    arrivals: Sequence[Arrival]
    block_tokens: int = 0

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        return self.arrivals[-1].at - self.arrivals[0].at

    @property
    def rate(self) -> float:
        """Requests a second; infinite where all come at once."""
        return (len(self.arrivals) - 1) / self.seconds if self.seconds > 0 else math.inf

    def scaled(self, rate: float = 1.0, prompt: float = 1.0, output: float = 1.0, limit: int | None = None) -> Trace:
        """The same requests so many times as often, with prompts and answers so many times as long.

        Args:
            limit: take the first so many requests only.

        Raises:
            ConfigError: a factor that is not above zero, a limit below one, or block ids with other prompt lengths.
        """
        for name, factor in {"rate": rate, "prompt": prompt, "output": output}.items():
            if not 0 < factor < math.inf:
                raise ConfigError(f"the factor of {name} must be above 0, not {factor}")
        if limit is not None and limit < 1:
            raise ConfigError(f"a trace needs at least one request, so the limit cannot be {limit}")
        if prompt != 1.0 and self.block_tokens:
            raise ConfigError(f"{self.name} names the blocks of its prompts, so their lengths cannot be scaled")
        made = [
            Arrival(each.at / rate, _scaled(each.prompt, prompt), _scaled(each.output, output), each.blocks)
            for each in self.arrivals[:limit]
        ]
        return Trace(self.name, made, self.block_tokens)

    def redrawn(self, rate: float, seed: int) -> Trace:
        """The same lengths in the same order, arriving independently, so many a second on average.

        Raises:
            ConfigError: a rate that is not above zero.
        """
        if not 0 < rate < math.inf:
            raise ConfigError(f"requests arrive at a rate above 0, not {rate}/s")
        rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
        times = accumulate(rng.expovariate(rate) for _ in self.arrivals)
        made = [each._replace(at=at) for each, at in zip(self.arrivals, times, strict=True)]
        return Trace(self.name, made, self.block_tokens)


def load(path: Path) -> Trace:
    """Read a trace; the format is known by the columns or keys of its first line, and `.gz` by the name.

    Azure: TIMESTAMP, ContextTokens, GeneratedTokens (CSV). SplitwiseSim: arrival_timestamp, prompt_size, token_size
    (CSV). Mooncake: timestamp (ms), input_length, output_length, hash_ids (a JSON object a line).

    Raises:
        ConfigError: no such file, an unknown format, or a line that cannot be; the message names file and line.
    """
    try:
        with _open(path) as file:
            first = file.readline()
            file.seek(0)
            if first.lstrip().startswith("{"):
                return _checked(path, _mooncake(path, file), 512)
            reader = csv.DictReader(file)
            for read, columns in _CSV.items():
                if set(columns) <= set(reader.fieldnames or ()):
                    return _checked(path, read(path, reader), 0)
    except (OSError, UnicodeDecodeError, csv.Error, EOFError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    known = ", or ".join(" ".join(columns) for columns in _CSV.values())
    what = f"its first line is {first.strip()[:80]!r}" if first.strip() else "it is empty"
    raise ConfigError(f"unknown trace format in {path}: {what}; expected a CSV with {known}, or Mooncake's JSON lines")


def poisson(
    rate: float, seconds: float, seed: int, prompt: int = 1024, output: int = 128, spread: float = 0.6
) -> Trace:
    """Requests that arrive independently, with log-normal lengths; the same seed gives the same trace.

    Args:
        rate: requests a second, on average.
        prompt, output: medians of the lengths.
        spread: standard deviation of the lengths' logarithm; 0 makes all alike.
    """
    if not 0 < rate < math.inf or not 0 < seconds < math.inf:
        raise ConfigError(f"a Poisson trace needs a rate and a length above 0, not {rate}/s for {seconds} s")
    if not 1 <= prompt < MAX_TOKENS or not 1 <= output < MAX_TOKENS or spread < 0:
        raise ConfigError(f"a Poisson trace needs lengths of at least one token, not {prompt} and {output}")
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    made, at = [], rng.expovariate(rate)
    while at < seconds:
        long, short = (_scaled(median, math.exp(rng.gauss(0.0, spread))) for median in (prompt, output))
        made.append(Arrival(at, long, short))
        at += rng.expovariate(rate)
    return Trace(f"poisson:rate={rate:g}", made or [Arrival(0.0, prompt, output)])


def parse(text: str, seed: int) -> Trace:
    """A trace as a command names it: a path, or `poisson:rate=2,seconds=60,prompt=1024,output=128,spread=0.6`; of these
    several, with "+" between them, follow one another."""
    if not text.startswith("poisson:"):
        return load(Path(text))
    parts = text.split("+")
    if len(parts) == 1:
        return _made(text, seed)[0]
    begin, arrivals = 0.0, []
    for number, part in enumerate(parts):
        made, seconds = _made(part, seed + number)
        arrivals += [each._replace(at=begin + each.at) for each in made.arrivals]
        begin += seconds
    return Trace(text, arrivals)


def _made(text: str, seed: int) -> tuple[Trace, float]:
    """One that is made, and for how long requests arrive."""
    wanted: dict[str, Callable[[str], Any]] = {
        "rate": float,
        "seconds": float,
        "prompt": int,
        "output": int,
        "spread": float,
    }
    given: dict[str, Any] = {}
    for part in filter(None, text.removeprefix("poisson:").split(",")):
        name, _, value = part.partition("=")
        try:
            given[name] = wanted[name](value)
        except (KeyError, ValueError):
            raise ConfigError(f"{part!r} in {text!r} is not one of {', '.join(wanted)}, with a number") from None
    if not {"rate", "seconds"} <= given.keys():
        raise ConfigError(f"{text!r} needs rate and seconds")
    return poisson(seed=seed, **given), given["seconds"]


def _scaled(tokens: int, factor: float) -> int:
    return min(MAX_TOKENS - 1, max(1, round(tokens * factor)))


def _open(path: Path) -> IO[str]:
    if path.suffix != ".gz":
        return path.open(encoding="utf-8", newline="")
    return TextIOWrapper(gzip.open(path), encoding="utf-8", newline="")


def _azure(path: Path, rows: csv.DictReader[str]) -> Iterator[Arrival]:
    for row in rows:
        with _line(path, rows.line_num):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            yield Arrival(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _splitwise_sim(path: Path, rows: csv.DictReader[str]) -> Iterator[Arrival]:
    for row in rows:
        with _line(path, rows.line_num):
            yield Arrival(float(row["arrival_timestamp"]), int(row["prompt_size"]), int(row["token_size"]))


def _mooncake(path: Path, file: IO[str]) -> Iterator[Arrival]:
    for number, text in enumerate(file, 1):
        if text.strip():
            with _line(path, number):
                row: Mapping[str, Any] = json.loads(text)
                at, prompt, output = float(row["timestamp"]), int(row["input_length"]), int(row["output_length"])
                yield Arrival(at / 1000, prompt, output, tuple(map(int, row.get("hash_ids", ()))))


_CSV: dict[Callable[[Path, csv.DictReader[str]], Iterator[Arrival]], tuple[str, ...]] = {
    _azure: ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    _splitwise_sim: ("arrival_timestamp", "prompt_size", "token_size"),
}


class _line:  # noqa: N801 - reads as a statement
    """Names the line in whatever goes wrong with it."""

    def __init__(self, path: Path, number: int) -> None:
        self._where = f"{path}, line {number}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | KeyError | TypeError):
            raise ConfigError(f"{self._where}: this is no request ({type(error).__name__}: {error})") from error


def _checked(path: Path, rows: Iterator[Arrival], block_tokens: int) -> Trace:
    arrivals: list[Arrival] = []
    start = last = 0.0
    for number, each in enumerate(rows, 1):
        where = f"{path}, request {number}"
        if not math.isfinite(each.at):
            raise ConfigError(f"{where}: {each.at} is no time")
        if number == 1:
            start = last = each.at if abs(each.at) > 1e8 else min(0.0, each.at)  # a date begins the trace's time
        if each.at < last:
            raise ConfigError(f"{where}: it arrives {last - each.at:g} s before the one above; sort the trace by time")
        for name, tokens in (("prompt", each.prompt), ("answer", each.output)):
            if not 1 <= tokens < MAX_TOKENS:
                raise ConfigError(f"{where}: its {name} has {tokens} tokens; 1 to {MAX_TOKENS - 1} are possible")
        last = each.at
        arrivals.append(each._replace(at=each.at - start))
    if not arrivals:
        raise ConfigError(f"the trace {path} is empty")
    return Trace(path.name, arrivals, block_tokens if any(each.blocks for each in arrivals) else 0)
