# Gives Kubernetes' clients (client.authentication.k8s.io/v1) a token of the VM's own service account. The metadata
# server's tokens last five minutes at least; this one is asked for again after one.
server=http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/service-accounts/default/token
answer=$(curl --fail --silent --show-error --retry 3 --max-time 10 --header 'Metadata-Flavor: Google' "$server") || exit 1
value=$(printf '%s' "$answer" | tr '\n' ' ' | sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p')
[ -n "$value" ] || { echo "the metadata server gives no token of the VM's service account" >&2; exit 1; }
end=$(($(date +%s) + 60))
end=$(date -u -d "@$end" +%Y-%m-%dT%H:%M:%SZ 2>/dev/null || date -u -r "$end" +%Y-%m-%dT%H:%M:%SZ)
printf '{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "%s", "expirationTimestamp": "%s"}}\n' \
    "$value" "$end"
