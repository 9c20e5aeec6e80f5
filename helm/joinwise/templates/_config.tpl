{{/* joinwise.yaml: .Values.config, and over it what follows from the chart.

An engine pod offers Ray no CPU but one unit of its pool's own resource: exactly one worker of that pool fits, and
nothing else that asks for CPU is ever placed beside it. A worker on several hosts asks for no GPU itself: vLLM's Ray
executor takes those of all its pods. */}}
{{- define "joinwise.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $ports := include "joinwise.ports" . | fromYaml -}}
{{- $gateway := dict "host" "0.0.0.0" "http_port" 8000 "grpc_port" 8001 "ops_port" $ports.ops -}}
{{- $_ := set $gateway "replicas" (int .Values.gateway.replicas) -}}
{{- if .Values.gateway.autoscaling.enabled -}}
{{- $_ := set $gateway "replicas" (int .Values.gateway.autoscaling.minReplicas) -}}
{{- end -}}
{{- with .Values.gateway.tls -}}
{{- if .secret -}}
{{- $tls := dict "cert" "/etc/joinwise-tls/gateway/tls.crt" "key" "/etc/joinwise-tls/gateway/tls.key" -}}
{{- if .clientCertificates }}{{ $_ := set $tls "ca" "/etc/joinwise-tls/gateway/ca.crt" }}{{ end -}}
{{- $_ := set $gateway "tls" $tls -}}
{{- end -}}
{{- end -}}
{{- if .Values.gateway.keysSecret.name -}}
{{- $_ := set $gateway "keys_file" (printf "/etc/joinwise-keys/%s" .Values.gateway.keysSecret.key) -}}
{{- end -}}
{{- $_ := set $config "gateway" (merge $gateway (default (dict) $config.gateway)) -}}
{{- $_ := set $config "cluster" (include "joinwise.fullname" .) -}}
{{- $_ := set $config "ray" (merge (dict "address" "auto") (default (dict) $config.ray)) -}}
{{- if .Values.tls.secret -}}
{{- $tls := dict "cert" "/etc/joinwise-tls/peers/tls.crt" "key" "/etc/joinwise-tls/peers/tls.key" -}}
{{- $_ := set $config "tls" (merge $tls (dict "ca" "/etc/joinwise-tls/peers/ca.crt" "server_name" .Values.tls.serverName)) -}}
{{- end -}}
{{- $redis := dict -}}
{{- with include "joinwise.redis.url" . }}{{ $_ := set $redis "url" . }}{{ end -}}
{{- if include "joinwise.redis.tls" . -}}
{{- $tls := dict "ca" "/etc/joinwise-tls/redis/ca.crt" -}}
{{- if and (not .Values.redis.bundled.enabled) .Values.redis.external.tls.clientCertificate -}}
{{- $_ := merge $tls (dict "cert" "/etc/joinwise-tls/redis/tls.crt" "key" "/etc/joinwise-tls/redis/tls.key") -}}
{{- end -}}
{{- $_ := set $redis "tls" $tls -}}
{{- end -}}
{{- with $redis }}{{ $_ := set $config "redis" (merge . (default (dict) $config.redis)) }}{{ end -}}
{{- $pools := list -}}
{{- range .Values.pools -}}
{{- $gpus := include "joinwise.gpus" .resources | int -}}
{{- $mine := gt (int (.hosts | default 1)) 1 | ternary 0 $gpus -}}
{{- $resources := dict "num_cpus" 0 "num_gpus" $mine "custom" (dict (printf "joinwise_pool_%s" .name) 1) -}}
{{- $pool := omit . "hosts" "image" "resources" "sharedMemory" "nodeSelector" "tolerations" "affinity" "topologySpread" "priorityClassName" "runtimeClassName" -}}
{{- $_ := set $pool "device" (gt $gpus 0 | ternary "gpu" "cpu") -}}
{{- $_ := set $pool "threads" (.threads | default (include "joinwise.cores" .resources) | int) -}}
{{- $_ := set $pool "ops_port" $ports.ops -}}
{{- $pools = append $pools (set $pool "resources" $resources) -}}
{{- end -}}
{{- set $config "pools" $pools | toYaml -}}
{{- end -}}

{{/* Ports that the chart fixes. */}}
{{- define "joinwise.ports" -}}
ops: 9400
raylet: 52365
{{- end -}}

{{/* Seconds for which a pod may drain, and then until it is killed. */}}
{{- define "joinwise.drain" -}}
{{- dig "gateway" "drain_s" 30 .Values.config | int -}}
{{- end -}}
