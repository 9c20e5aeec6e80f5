{{/* Refuses what the schema cannot: parts that contradict each other. Ran by the ConfigMap. */}}
{{- define "joinwise.check" -}}
{{- include "joinwise.check.redis" . -}}
{{- include "joinwise.check.pools" . -}}
{{- include "joinwise.check.drafts" . -}}
{{- with .Values.gateway.autoscaling -}}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) -}}
{{- fail (printf "gateway.autoscaling: minReplicas (%d) is more than maxReplicas (%d)" (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.gateway.tls.clientCertificates (not .Values.gateway.tls.secret) -}}
{{- fail "gateway.tls: clientCertificates needs gateway.tls.secret" -}}
{{- end -}}
{{- if and .Values.gateway.route.enabled (not .Values.gateway.route.parentRefs) -}}
{{- fail "gateway.route: no parentRefs; name the Gateway that the routes attach to" -}}
{{- end -}}
{{- if and .Values.modelStorage.existingClaim .Values.modelStorage.claim.enabled -}}
{{- fail "modelStorage: both existingClaim and claim.enabled are set; keep one" -}}
{{- end -}}
{{- end -}}

{{- define "joinwise.check.redis" -}}
{{- $redis := .Values.redis -}}
{{- $external := or $redis.external.url $redis.external.existingSecret.name -}}
{{- if and $redis.bundled.enabled $external -}}
{{- fail "redis: both bundled and external are set; set redis.bundled.enabled=false to use the external one" -}}
{{- end -}}
{{- if not (or $redis.bundled.enabled $external) -}}
{{- fail "redis: none is set; enable redis.bundled, or set redis.external.url or redis.external.existingSecret.name" -}}
{{- end -}}
{{- if and $redis.external.tls.clientCertificate (not $redis.external.tls.secret) -}}
{{- fail "redis.external.tls: clientCertificate needs redis.external.tls.secret" -}}
{{- end -}}
{{- if and $redis.external.tls.secret (hasPrefix "redis://" $redis.external.url) -}}
{{- fail "redis.external: a TLS secret is set, but the URL is redis://; write rediss://" -}}
{{- end -}}
{{- end -}}

{{- define "joinwise.check.pools" -}}
{{- $models := dict -}}
{{- range .Values.config.models }}{{ $_ := set $models .name (list) }}{{ end -}}
{{- $seen := list "gateway" "headgroup" -}}
{{- range .Values.pools -}}
{{- if has .name $seen -}}
{{- fail (printf "pools: the name '%s' is taken; give each pool its own (not gateway, not headgroup)" .name) -}}
{{- end -}}
{{- $seen = append $seen .name -}}
{{- if not (hasKey $models .model) -}}
{{- fail (printf "pools: '%s' names the model '%s', which config.models lacks" .name .model) -}}
{{- end -}}
{{- if or .autoscale (gt (hasKey . "replicas" | ternary .replicas 1 | int) 0) -}}
{{- $_ := set $models .model (append (get $models .model) .role) -}}
{{- end -}}
{{- end -}}
{{- range $model, $roles := $models -}}
{{- if not (or (has "mixed" $roles) (and (has "prefill" $roles) (has "decode" $roles))) -}}
{{- fail (printf "pools: the model '%s' needs workers for prefill and for decode, or mixed ones; it has: %s" $model (join ", " $roles | default "none")) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "joinwise.check.drafts" -}}
{{- $drafts := dict -}}
{{- range .Values.pools -}}
{{- if eq .role "draft" -}}
{{- $_ := set $drafts .name .model -}}
{{- if gt (include "joinwise.gpus" .resources | int) 0 -}}
{{- if not (dig "model" "" (.draft | default dict)) -}}
{{- fail (printf "pools: '%s' looks drafts up in the prompt: that needs no GPU" .name) -}}
{{- end -}}
{{- if eq (dig "dtype" "" .draft) "int8" -}}
{{- fail (printf "pools: '%s' drafts on a GPU, and int8 weights of a draft model are for CPUs" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $asked := list -}}
{{- range $pool := .Values.pools -}}
{{- with $pool.speculation -}}
{{- if not (hasKey $drafts .draft) -}}
{{- fail (printf "pools: '%s' asks '%s' for drafts, which is no pool with role draft" $pool.name .draft) -}}
{{- end -}}
{{- if ne (get $drafts .draft) $pool.model -}}
{{- fail (printf "pools: '%s' serves '%s', but '%s' drafts for '%s'" $pool.name $pool.model .draft (get $drafts .draft)) -}}
{{- end -}}
{{- $asked = append $asked .draft -}}
{{- end -}}
{{- end -}}
{{- range $name, $model := $drafts -}}
{{- if not (has $name $asked) -}}
{{- fail (printf "pools: '%s' drafts for nobody; name it in speculation.draft of a decode or mixed pool" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
