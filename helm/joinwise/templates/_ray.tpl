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
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Pod template of a Ray node. Takes root, component, name (of the container), resources, nodeSelector, tolerations,
ports (name to number) and readiness (an HTTP path and port). A restart is asked for when Ray's own node is sick;
worker groups need a readiness probe of their own, since KubeRay's asks a Serve proxy that does not run here. */}}
{{- define "joinwise.ray" -}}
{{- $values := .root.Values -}}
metadata:
  labels:
    {{- include "joinwise.selector" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
  annotations:
    checksum/config: {{ include "joinwise.config" .root | sha256sum }}
spec:
  {{- include "joinwise.pod" .root | nindent 2 }}
  {{- with .nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ include "joinwise.image" .root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      env: {{- include "joinwise.env" .root | nindent 8 }}
      {{- with .ports }}
      ports:
        {{- range $name, $port := . }}
        - name: {{ $name }}
          containerPort: {{ $port }}
        {{- end }}
      {{- end }}
      resources: {{- toYaml .resources | nindent 8 }}
      securityContext: {{- toYaml $values.securityContext | nindent 8 }}
      startupProbe:
        httpGet: {path: /api/healthz, port: 52365}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 60
      livenessProbe:
        httpGet: {path: /api/healthz, port: 52365}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      readinessProbe:
        httpGet: {{- toYaml .readiness | nindent 10 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      volumeMounts:
        - {name: config, mountPath: /etc/joinwise, readOnly: true}
        - {name: models, mountPath: /models}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: config
      configMap: {name: {{ include "joinwise.fullname" .root }}}
    - name: models
      {{- if $values.modelStorage.existingClaim }}
      persistentVolumeClaim: {claimName: {{ $values.modelStorage.existingClaim }}}
      {{- else }}
      emptyDir: {}
      {{- end }}
    - name: tmp
      emptyDir: {}
{{- end -}}

{{/* One worker group; takes root, group, replicas, start (ray start's parameters) and joinwise.ray's arguments. */}}
{{- define "joinwise.group" -}}
- groupName: {{ .group }}
  replicas: {{ .replicas }}
  minReplicas: {{ .replicas }}
  maxReplicas: {{ .replicas }}
  rayStartParams: {{- toYaml .start | nindent 4 }}
  template: {{- include "joinwise.ray" . | nindent 4 }}
{{- end -}}
