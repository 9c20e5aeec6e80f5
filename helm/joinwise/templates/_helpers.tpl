{{/* Name of everything; KubeRay appends to it, so it stays short. */}}
{{- define "joinwise.fullname" -}}
{{- $name := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "joinwise.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "joinwise.labels" -}}
{{ include "joinwise.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "joinwise.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "joinwise.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "joinwise.fullname" .) "default") }}
{{- end -}}

{{/* What every pod says. Service links are off: Kubernetes would put JOINWISE_..._PORT variables into the pods, and
joinwise refuses JOINWISE_ variables that it does not know. */}}
{{- define "joinwise.pod" -}}
serviceAccountName: {{ include "joinwise.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Whole cores of a pool's or the gateway's pod: of its CPU limit, else of its request; at least 1. */}}
{{- define "joinwise.cores" -}}
{{- $cpu := dig "limits" "cpu" (dig "requests" "cpu" "1" .) . | toString -}}
{{- if hasSuffix "m" $cpu -}}
{{- max 1 (div (trimSuffix "m" $cpu | int) 1000) -}}
{{- else -}}
{{- max 1 (float64 $cpu | int) -}}
{{- end -}}
{{- end -}}

{{/* GPUs of a pool's pod: of the limit that ends in "gpu". */}}
{{- define "joinwise.gpus" -}}
{{- $gpus := 0 -}}
{{- range $name, $count := dig "limits" (dict) . -}}
{{- if hasSuffix "gpu" $name }}{{ $gpus = $count }}{{ end -}}
{{- end -}}
{{- $gpus -}}
{{- end -}}

{{- define "joinwise.redis.url" -}}
{{- if .Values.redis.bundled.enabled -}}
redis://{{ include "joinwise.fullname" . }}-redis:6379
{{- else -}}
{{ .Values.redis.external.url }}
{{- end -}}
{{- end -}}

{{/* Refuses what the schema cannot: parts that contradict each other. */}}
{{- define "joinwise.check" -}}
{{- $external := or .Values.redis.external.url .Values.redis.external.existingSecret.name -}}
{{- if and .Values.redis.bundled.enabled $external -}}
{{- fail "redis: both bundled and external are set; set redis.bundled.enabled=false to use the external one" -}}
{{- end -}}
{{- if not (or .Values.redis.bundled.enabled $external) -}}
{{- fail "redis: none is set; enable redis.bundled, or set redis.external.url or redis.external.existingSecret.name" -}}
{{- end -}}
{{- $seen := list "gateway" "headgroup" -}}
{{- range .Values.pools -}}
{{- if has .name $seen -}}
{{- fail (printf "pools: the name '%s' is taken; give each pool its own (not gateway, not headgroup)" .name) -}}
{{- end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- end -}}
