{{/* joinwise.yaml: .Values.config, and over it what follows from the chart.

An engine pod offers Ray no CPU but one unit of its pool's own resource: exactly one worker of that pool fits, and
nothing else that asks for CPU is ever placed beside it. */}}
{{- define "joinwise.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $gateway := dict "host" "0.0.0.0" "http_port" 8000 "grpc_port" 8001 "replicas" .Values.gateway.replicas -}}
{{- $_ := set $config "gateway" (merge $gateway (default (dict) $config.gateway)) -}}
{{- $_ := set $config "cluster" (include "joinwise.fullname" .) -}}
{{- $_ := set $config "ray" (merge (dict "address" "auto") (default (dict) $config.ray)) -}}
{{- with include "joinwise.redis.url" . -}}
{{- $_ := set $config "redis" (merge (dict "url" .) (default (dict) $config.redis)) -}}
{{- end -}}
{{- $pools := list -}}
{{- range .Values.pools -}}
{{- $gpus := include "joinwise.gpus" .resources | int -}}
{{- $resources := dict "num_cpus" 0 "num_gpus" $gpus "custom" (dict (printf "joinwise_pool_%s" .name) 1) -}}
{{- $pool := pick . "name" "model" "role" "replicas" "engine" -}}
{{- $_ := set $pool "device" (gt $gpus 0 | ternary "gpu" "cpu") -}}
{{- $_ := set $pool "threads" (.threads | default (include "joinwise.cores" .resources) | int) -}}
{{- $pools = append $pools (set $pool "resources" $resources) -}}
{{- end -}}
{{- set $config "pools" $pools | toYaml -}}
{{- end -}}
