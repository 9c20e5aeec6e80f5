{{/* Environment of every Ray container. The cluster's name in Redis is the Ray cluster's: two of them, during an
upgrade, share a Redis and never meet. */}}
{{- define "joinwise.env" -}}
- name: JOINWISE_CONFIG
  value: /etc/joinwise/joinwise.yaml
- name: JOINWISE_CLUSTER
  valueFrom: {fieldRef: {fieldPath: "metadata.labels['ray.io/cluster']"}}
- name: JOINWISE_CACHE
  value: /models/joinwise
- name: HF_HOME
  value: /models/huggingface
- name: HOME
  value: /tmp
{{- if .Values.redis.bundled.enabled }}
- name: JOINWISE_REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "joinwise.fullname" . }}-redis, key: password}}
{{- else if .Values.redis.external.existingSecret.name }}
- name: JOINWISE_REDIS__URL
  valueFrom: {secretKeyRef: {{ toJson .Values.redis.external.existingSecret }}}
{{- end }}
{{- if .Values.gateway.apiKeysSecret.name }}
- name: JOINWISE_GATEWAY__API_KEYS
  valueFrom: {secretKeyRef: {{ toJson .Values.gateway.apiKeysSecret }}}
{{- end }}
{{- if .Values.modelStorage.hubToken.name }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {{ toJson .Values.modelStorage.hubToken }}}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Volumes of every Ray pod: name, where it is mounted, whether it may be written, and its source. */}}
{{- define "joinwise.volumes" -}}
{{- $storage := .root.Values.modelStorage -}}
- {name: config, path: /etc/joinwise, source: {configMap: {name: {{ include "joinwise.fullname" .root }}}}}
- {name: tmp, path: /tmp, write: true, source: {emptyDir: {}}}
- name: models
  path: /models
  write: true
  {{- with include "joinwise.claim" .root }}
  source: {persistentVolumeClaim: {claimName: {{ . }}}}
  {{- else }}
  source: {emptyDir: {}}
  {{- end }}
{{- if $storage.image.reference }}
- {name: model-image, path: /model-image, source: {image: {{ toJson $storage.image }}}}
{{- end }}
{{- with .root.Values.tls.secret }}
- {name: tls-peers, path: /etc/joinwise-tls/peers, source: {secret: {secretName: {{ . }}}}}
{{- end }}
{{- with include "joinwise.redis.tls" .root }}
- {name: tls-redis, path: /etc/joinwise-tls/redis, source: {secret: {secretName: {{ . }}}}}
{{- end }}
{{- if eq .component "gateway" }}
{{- with .root.Values.gateway.tls.secret }}
- {name: tls-gateway, path: /etc/joinwise-tls/gateway, source: {secret: {secretName: {{ . }}}}}
{{- end }}
{{- with .root.Values.gateway.keysSecret.name }}
- {name: keys, path: /etc/joinwise-keys, source: {secret: {secretName: {{ . }}}}}
{{- end }}
{{- end }}
{{- with .sharedMemory }}
- {name: shm, path: /dev/shm, write: true, source: {emptyDir: {medium: Memory, sizeLimit: {{ . }}}}}
{{- end }}
{{- end -}}

{{/* Probes and the preStop hook of a Ray container. A restart is asked for when Ray's node agent does not answer, or
joinwise's process in the pod makes no progress; a pod without such a process waits for one, and is left alone. Ready is
a worker that has registered, and a gateway that has workers of every role. KubeRay's own probe of worker pods asks a
Serve proxy that does not run here. */}}
{{- define "joinwise.probes" -}}
{{- $ports := include "joinwise.ports" .root | fromYaml -}}
{{- $tls := .root.Values.tls.secret | empty | not | ternary "HTTPS" "HTTP" -}}
startupProbe:
  httpGet: {path: /api/healthz, port: {{ $ports.raylet }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
{{- if eq .component "head" }}
livenessProbe:
  httpGet: {path: /api/healthz, port: {{ $ports.raylet }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  httpGet: {path: /api/healthz, port: {{ $ports.raylet }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- else }}
{{- $ops := printf "python -m joinwise.actors.ops --port %v%s" $ports.ops (eq $tls "HTTPS" | ternary " --tls" "") }}
livenessProbe:
  exec: {command: [sh, -c, exec {{ $ops }} --timeout 10 live]}
  periodSeconds: 20
  timeoutSeconds: 15
  failureThreshold: 6
readinessProbe:
  {{- if gt (int (.hosts | default 1)) 1 }}
  httpGet: {path: /api/healthz, port: {{ $ports.raylet }}} # one pod of several holds the worker
  {{- else }}
  httpGet: {path: /readyz, port: ops, scheme: {{ $tls }}}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
lifecycle:
  preStop:
    exec: {command: [sh, -c, exec {{ $ops }} --timeout {{ add (include "joinwise.drain" .root) 15 }} drain]}
{{- end }}
{{- end -}}

{{/* Pod template of a Ray node. Takes root, component, name (of the container), image, resources, sharedMemory, ports
(name to number), labels (text) and what places it. */}}
{{- define "joinwise.ray" -}}
{{- $values := .root.Values -}}
{{- $labels := printf "%s\napp.kubernetes.io/component: %s" (include "joinwise.selector" .root) .component -}}
{{- if .group }}{{ $labels = printf "%s\njoinwise/pool: %s" $labels .group }}{{ end -}}
metadata:
  labels:
    {{- $labels | nindent 4 }}
    {{- if ne .component "head" }}
    joinwise/metrics: "true"
    {{- end }}
  annotations:
    checksum/config: {{ include "joinwise.config" .root | sha256sum }}
spec:
  {{- include "joinwise.pod" .root | nindent 2 }}
  automountServiceAccountToken: {{ and (eq .component "head") (ne (include "joinwise.scaled" .root) "") }}
  {{- if ne .component "head" }}
  terminationGracePeriodSeconds: {{ add (include "joinwise.drain" .root) 60 }}
  {{- end }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" }}
  {{- with get $ $key }}
  {{ $key }}: {{- if kindIs "string" . }} {{ . }}{{ else }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
  {{- end }}
  {{- with .topologySpread }}
  topologySpreadConstraints: {{- include "joinwise.spread" (dict "list" . "labels" $labels) | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ .image | default (include "joinwise.image" .root) }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      env: {{- include "joinwise.env" .root | nindent 8 }}
      ports:
        {{- range $name, $port := .ports }}
        - {name: {{ $name }}, containerPort: {{ $port }}}
        {{- end }}
      resources: {{- toYaml .resources | nindent 8 }}
      securityContext: {{- toYaml $values.securityContext | nindent 8 }}
      {{- include "joinwise.probes" . | nindent 6 }}
      {{- $volumes := include "joinwise.volumes" . | fromYamlArray }}
      volumeMounts:
        {{- range $volumes }}
        - {name: {{ .name }}, mountPath: {{ .path }}, readOnly: {{ not .write }}}
        {{- end }}
  volumes:
    {{- range $volumes }}
    - {{- merge (dict "name" .name) .source | toYaml | nindent 6 }}
    {{- end }}
{{- end -}}

{{/* One worker group; takes root, group, replicas, least, most, hosts, start (ray start's parameters) and joinwise.ray's
arguments. */}}
{{- define "joinwise.group" -}}
- groupName: {{ .group }}
  replicas: {{ .replicas }}
  minReplicas: {{ hasKey . "least" | ternary .least .replicas }}
  maxReplicas: {{ .most | default .replicas }}
  {{- if gt (int (.hosts | default 1)) 1 }}
  numOfHosts: {{ .hosts }}
  {{- end }}
  rayStartParams: {{- toYaml .start | nindent 4 }}
  template: {{- include "joinwise.ray" . | nindent 4 }}
{{- end -}}
