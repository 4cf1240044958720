#!/bin/sh
# Turns a fresh VM into a Krustlet node: fetches the agent from the registry by digest, checks it, and runs it as a
# service. Runs at every boot, and again whenever the metadata change, and ends the same each time. What it needs to know
# is in the VM's metadata attributes:
#   krustlet-image REPOSITORY@DIGEST, krustlet-sha256, krustlet-bootstrap-kubeconfig, krustlet-verification-key,
#   krustlet-node-labels, krustlet-max-pods, krustlet-app-port
set -eu
umask 022

PREFIX=${PREFIX:-/usr/local}
SYSCONFDIR=${SYSCONFDIR:-/etc}
SYSTEMD_UNIT_PATH=${SYSTEMD_UNIT_PATH:-/etc/systemd/system}
METADATA=http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1
AGENT=$PREFIX/bin/krustlet
WATCH=$PREFIX/sbin/krustlet-metadata
CONFIG=$SYSCONFDIR/krustlet
UNIT=$SYSTEMD_UNIT_PATH/krustlet.service
WATCH_UNIT=$SYSTEMD_UNIT_PATH/krustlet-metadata.service

say() {
    echo "krustlet: $*" >&2
}

die() {
    say "$*"
    exit 1
}

# A VM's network may come up after this script has started.
fetch() {
    curl --fail --silent --show-error --location --connect-timeout 5 --retry 10 --retry-delay 2 --retry-connrefused "$@"
}

metadata() {
    fetch --header 'Metadata-Flavor: Google' "$METADATA/$1" || die "the metadata server does not give $1"
}

# The first string value of a key of a JSON document on stdin.
json_string() {
    tr '\n' ' ' | sed -n 's/.*"'"$1"'" *: *"\([^"]*\)".*/\1/p'
}

sha256() {
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum "$1" | cut -d ' ' -f 1
    else
        shasum -a 256 "$1" | cut -d ' ' -f 1
    fi
}

# The value of a parameter of a WWW-Authenticate header on stdin.
parameter() {
    sed -n 's/.*[ ,]'"$1"'="\([^"]*\)".*/\1/p'
}

# A registry token for what a URL's challenge asks for; nothing if the registry asks for none.
# Secrets go through curl's standard input, because arguments can be seen by every process.
registry_token() {
    challenge=$(curl --silent --show-error --output /dev/null --dump-header - --connect-timeout 5 --retry 10 \
        --retry-delay 2 --retry-connrefused "$1" | tr -d '\r' | sed -n 's/^[Ww][Ww][Ww]-[Aa]uthenticate: *[Bb]earer/ /p')
    [ -n "$challenge" ] || return 0
    account=$(metadata instance/service-accounts/default/token | json_string access_token)
    [ -n "$account" ] || die "the metadata server gives no token of the VM's service account"
    answer=$(printf 'user = "oauth2accesstoken:%s"\n' "$account" | fetch --config - --get \
        --data-urlencode "service=$(echo "$challenge" | parameter service)" \
        --data-urlencode "scope=$(echo "$challenge" | parameter scope)" \
        "$(echo "$challenge" | parameter realm)") || die "the registry gives no token to the VM's service account"
    token=$(echo "$answer" | json_string token)
    [ -n "$token" ] || token=$(echo "$answer" | json_string access_token)
    echo "$token"
}

# download URL FILE: what a registry has under a URL, without its token on a command line.
download() {
    printf '%s\n' "${TOKEN:+header = \"Authorization: Bearer $TOKEN\"}" |
        fetch --config - --header 'Accept: application/vnd.oci.image.manifest.v1+json, */*' --output "$2" "$1" ||
        die "the registry does not give $1"
}

install_agent() {
    image=$(metadata instance/attributes/krustlet-image)
    wanted=$(metadata instance/attributes/krustlet-sha256)
    if [ -x "$AGENT" ] && [ "$(sha256 "$AGENT")" = "$wanted" ]; then
        say "the agent is there"
        return 0
    fi
    repository=${image%@*}
    digest=${image##*@}
    host=${repository%%/*}
    case $host in
    localhost | localhost:* | 127.* | '[::1]'*) scheme=http ;;
    *) scheme=https ;;
    esac
    registry=$scheme://$host/v2/${repository#*/}
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    say "pulling $image"
    TOKEN=$(registry_token "$registry/manifests/$digest")
    download "$registry/manifests/$digest" "$scratch/manifest"
    [ "sha256:$(sha256 "$scratch/manifest")" = "$digest" ] || die "the registry's manifest is not $digest"
    grep -q "sha256:$wanted" "$scratch/manifest" || die "$image does not have the agent $wanted"
    download "$registry/blobs/sha256:$wanted" "$scratch/krustlet"
    [ "$(sha256 "$scratch/krustlet")" = "$wanted" ] || die "the registry's agent is not $wanted"
    mkdir -p "$PREFIX/bin"
    chmod 755 "$scratch/krustlet"
    # Beside the old one and then renamed: a program that runs cannot be written to.
    cp -p "$scratch/krustlet" "$AGENT.new"
    mv -f "$AGENT.new" "$AGENT"
    rm -rf "$scratch"
    trap - EXIT
}

# A word of a unit's line: systemd splits at blanks, and has a meaning of its own for % and quotes.
word() {
    printf '"%s"' "$1" | sed 's/\\/\\\\/g; s/%/%%/g'
}

# Changes with everything that the service is made of.
fingerprint() {
    cat "$AGENT" "$CONFIG"/* "$UNIT" 2>/dev/null | cksum
}

# Port 10250 is the kubelet's, where the API server looks for logs.
# Everything is asked for before the first file is written: a failure inside a here-document would go unnoticed, and the
# agent would be configured with nothing where its name or its address belongs.
write_configuration() {
    # First of all, because they name the configuration that the rest is of: metadata that change meanwhile are read
    # again.
    labels=$(metadata instance/attributes/krustlet-node-labels)
    image=$(metadata instance/attributes/krustlet-image)
    bootstrap=$(metadata instance/attributes/krustlet-bootstrap-kubeconfig)
    key=$(metadata instance/attributes/krustlet-verification-key)
    max_pods=$(metadata instance/attributes/krustlet-max-pods)
    name=$(metadata instance/name)
    hostname=$(metadata instance/hostname)
    zone=$(metadata instance/zone)
    project=$(metadata project/project-id)
    address=$(metadata instance/network-interfaces/0/ip)
    external=$(metadata instance/network-interfaces/0/access-configs/0/external-ip)
    mkdir -p "$CONFIG"
    # Readable by the service's own user, as is the metadata server that it comes from. The token in it ends within
    # minutes and is deleted once the node has joined.
    printf '%s\n' "$bootstrap" >"$CONFIG/bootstrap.kubeconfig"
    printf '%s\n' "$key" >"$CONFIG/verification.pem"
    cat >"$CONFIG/krustlet.env" <<EOF
GCE_METADATA_HOST=${GCE_METADATA_HOST:-metadata.google.internal}
KRUSTLET_ADDRESS=$address
KRUSTLET_PORT=10250
KRUSTLET_NODE_IP=$address
KRUSTLET_EXTERNAL_IP=$external
KRUSTLET_NODE_NAME=$name
KRUSTLET_HOSTNAME=$hostname
KRUSTLET_PROVIDER_ID=gce://$project/${zone##*/}/$name
KRUSTLET_BOOTSTRAP_FILE="$CONFIG/bootstrap.kubeconfig"
KRUSTLET_VERIFICATION_KEYS="$CONFIG/verification.pem"
KRUSTLET_REGISTRY_CREDENTIALS=gce
KRUSTLET_TRUSTED_REGISTRIES=${image%%/*}
NODE_LABELS=$labels
MAX_PODS=$max_pods
RUST_LOG=info
EOF
}

# MemoryDenyWriteExecute stays off: the agent compiles WebAssembly to machine code, which is memory that was written and
# is then executed.
write_unit() {
    port=$(metadata instance/attributes/krustlet-app-port)
    capabilities=
    if [ "$port" -lt 1024 ]; then
        capabilities=CAP_NET_BIND_SERVICE
    fi
    mkdir -p "$SYSTEMD_UNIT_PATH"
    cat >"$UNIT" <<EOF
[Unit]
Description=Krustlet, a Kubernetes node agent that runs WebAssembly
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
EnvironmentFile=$(echo "$CONFIG" | sed 's/%/%%/g')/krustlet.env
ExecStart=$(word "$AGENT") --data-dir \${STATE_DIRECTORY}
Restart=always
RestartSec=2
KillSignal=SIGTERM
TimeoutStopSec=60
DynamicUser=yes
StateDirectory=krustlet
StateDirectoryMode=0700
UMask=0077
LimitNOFILE=65536
AmbientCapabilities=$capabilities
CapabilityBoundingSet=$capabilities
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=no
PrivateDevices=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
EOF
}

# Puts a file in the place of another one, which may be running.
put() {
    cat >"$1.new"
    chmod "$2" "$1.new"
    mv -f "$1.new" "$1"
}

# What is changed in the metadata of a running VM reaches the agent without a reboot.
write_watch() {
    mkdir -p "$PREFIX/sbin"
    put "$WATCH" 755 <<'EOF'
#!/bin/sh
# Runs the VM's startup script when it starts and whenever the VM's metadata change.
attributes=http://$GCE_METADATA_HOST/computeMetadata/v1/instance/attributes/

ask() {
    curl --fail --silent --show-error --connect-timeout 5 --header 'Metadata-Flavor: Google' "$@"
}

# A failure is tried again after a while; this program anew, because the script may have put another in its place.
again() {
    sleep "$1"
    exec "$0"
}

# The name of what the attributes are; with `wait_for_change` not before they are something else.
etag() {
    ask --output /dev/null --dump-header - "$attributes?recursive=true$1" | tr -d '\r' | sed -n 's/^[Ee][Tt][Aa][Gg]: *//p'
}

seen=$(etag '')
[ -n "$seen" ] || again 5
script=$(mktemp) || again 5
ask --output "$script" "${attributes}startup-script" && sh "$script"
status=$?
rm -f "$script"
[ "$status" = 0 ] || again 10
while [ "$(etag "&wait_for_change=true&timeout_sec=300&last_etag=$seen")" = "$seen" ]; do :; done
again 0
EOF
    put "$WATCH_UNIT" 644 <<EOF
[Unit]
Description=Krustlet's configuration, from the VM's metadata
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Environment=GCE_METADATA_HOST=${GCE_METADATA_HOST:-metadata.google.internal}
Environment=$(word "PREFIX=$PREFIX") $(word "SYSCONFDIR=$SYSCONFDIR")
Environment=$(word "SYSTEMD_UNIT_PATH=$SYSTEMD_UNIT_PATH")
ExecStart=$(word "$WATCH")
Restart=always
RestartSec=5
UMask=0022
EOF
}

before=$(fingerprint)
install_agent
write_configuration
write_unit
write_watch
systemctl daemon-reload
systemctl enable krustlet
# At a second boot it runs already, with what was written at the first. Started anew for nothing, it would start its pods
# anew.
if [ "$(fingerprint)" = "$before" ]; then
    systemctl start krustlet
else
    systemctl restart krustlet
fi
# Not enabled: it would run this script at boot too, beside the one that boots.
systemctl start krustlet-metadata
say "started"
