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
{{ .Values.redis.bundled.tls.secret | empty | not | ternary "rediss" "redis" }}://{{ include "joinwise.fullname" . }}-redis:6379
{{- else -}}
{{ .Values.redis.external.url }}
{{- end -}}
{{- end -}}

{{/* Secret with the authority of Redis' certificate, if any. */}}
{{- define "joinwise.redis.tls" -}}
{{- .Values.redis.bundled.enabled | ternary .Values.redis.bundled.tls.secret .Values.redis.external.tls.secret -}}
{{- end -}}

{{/* Claim that holds models, if any. */}}
{{- define "joinwise.claim" -}}
{{- .Values.modelStorage.existingClaim | default (.Values.modelStorage.claim.enabled | ternary (printf "%s-models" (include "joinwise.fullname" .)) "") -}}
{{- end -}}

{{/* Topology spread constraints; takes list and labels (text), which those without a labelSelector count. */}}
{{- define "joinwise.spread" -}}
{{- $labels := .labels | fromYaml -}}
{{- $all := list -}}
{{- range .list -}}
{{- $all = append $all (merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" $labels))) -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Not empty where gateways or a pool grow and shrink: Ray's autoscaler then adds and removes their pods. */}}
{{- define "joinwise.scaled" -}}
{{- $scaled := .Values.gateway.autoscaling.enabled -}}
{{- range .Values.pools }}{{ if .autoscale }}{{ $scaled = true }}{{ end }}{{ end -}}
{{- if $scaled }}yes{{ end -}}
{{- end -}}
