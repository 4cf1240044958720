#!/bin/sh
# Turns a fresh VM into a Krustlet node: fetches the agent from the registry by digest, checks its signature and its
# sum, and runs it as a service. Runs at every boot, and again whenever the metadata change, and ends the same each time. What it needs to know
# is in the VM's metadata attributes:
#   krustlet-image REPOSITORY@DIGEST, krustlet-sha256, krustlet-bootstrap-kubeconfig, krustlet-verification-key,
#   krustlet-node-labels, krustlet-max-pods, krustlet-app-port, and krustlet-pod-range where each pod has an address of
#   its own: how much of the network's the VM has for them, a mask
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

# What was just made takes its time: a role reaches the registry within minutes, a network may come up after this script
# has started. So long each thing is waited for, and so long it may be silent.
WAIT_SECONDS=${WAIT_SECONDS:-600}
RETRY_SECONDS=${RETRY_SECONDS:-2}
STALL_SECONDS=${STALL_SECONDS:-20}

exec 3>&2
say() {
    echo "krustlet: $*" >&3
}

die() {
    say "$*"
    exit 1
}

# A clock that nobody sets: a VM's jumps when it first hears the time.
seconds() {
    cut -d . -f 1 /proc/uptime 2>/dev/null || date +%s
}

# patiently WHAT COMMAND...: runs a command until it succeeds, and says what is waited for and why.
patiently() {
    what=$1
    shift
    end=$(($(seconds) + WAIT_SECONDS))
    pause=$RETRY_SECONDS
    code=
    until "$@" 2>"$scratch/why"; do
        why=$(tail -n 1 "$scratch/why")
        case $code in
        401 | 403) why="$why (a role that was just given takes some minutes)" ;;
        esac
        [ "$(seconds)" -lt "$end" ] || die "gave up on $what after $WAIT_SECONDS s: $why"
        say "waiting for $what: $why"
        sleep "$pause"
        pause=$((pause * 2 < 30 ? pause * 2 : 30))
        code=
    done
}

# get FILE OPTION... URL: one attempt; the answer's status is in `code`. Slower than 1 kB/s is a stall.
get() {
    into=$1
    shift
    code=$(curl --fail --silent --show-error --location --connect-timeout 10 --speed-limit 1000 \
        --speed-time "$STALL_SECONDS" --output "$into" --write-out '%{http_code}' "$@")
}

# A value, or nothing where the metadata server says that there is none: it will not come.
get_metadata() {
    : >"$scratch/value"
    get "$scratch/value" --header 'Metadata-Flavor: Google' "$METADATA/$1" || [ "$code" = 404 ]
}

optional_metadata() {
    patiently "the metadata server's $1" get_metadata "$1"
    cat "$scratch/value"
}

metadata() {
    optional_metadata "$1"
    [ "$code" != 404 ] || die "the metadata server does not give $1"
}

# An interface gets its alias range after the metadata that announce it, or another one.
get_alias_range() {
    get_metadata instance/network-interfaces/0/ip-aliases/0 || return 1
    case $(cat "$scratch/value") in
    *"$1") ;;
    *)
        echo "the VM has no alias range of the size $1" >&2
        return 1
        ;;
    esac
}

alias_range() {
    patiently "the VM's alias range" get_alias_range "$1"
    cat "$scratch/value"
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

# Asks for the registry token that a URL's challenge wants: a line of curl's configuration, empty if it wants none.
# Secrets go through curl's standard input, because arguments can be seen by every process.
authorize() {
    authorization=
    rm -f "$scratch/headers" "$scratch/account" "$scratch/token"
    curl --silent --show-error --connect-timeout 10 --speed-limit 1000 --speed-time "$STALL_SECONDS" \
        --output /dev/null --dump-header "$scratch/headers" "$1" || return 1
    challenge=$(tr -d '\r' <"$scratch/headers" | sed -n 's/^[Ww][Ww][Ww]-[Aa]uthenticate: *[Bb]earer/ /p')
    [ -n "$challenge" ] || return 0
    get "$scratch/account" --header 'Metadata-Flavor: Google' "$METADATA/instance/service-accounts/default/token" ||
        return 1
    account=$(json_string access_token <"$scratch/account")
    if [ -z "$account" ]; then
        echo "the metadata server gives no token of the VM's service account" >&2
        return 1
    fi
    get "$scratch/token" --config - --get --data-urlencode "service=$(echo "$challenge" | parameter service)" \
        --data-urlencode "scope=$(echo "$challenge" | parameter scope)" "$(echo "$challenge" | parameter realm)" <<EOF ||
user = "oauth2accesstoken:$account"
EOF
        return 1
    token=$(json_string token <"$scratch/token")
    [ -n "$token" ] || token=$(json_string access_token <"$scratch/token")
    authorization="header = \"Authorization: Bearer $token\""
}

# download FILE SHA256 URL: goes on where the last attempt was interrupted, be it before a reboot. The registry is asked
# for a token each time, since an account's rights may be new.
download() {
    [ ! -e "$1" ] || [ "$(sha256 "$1")" != "$2" ] || return 0
    authorize "$registry/manifests/$digest" || return 1
    get "$1" --continue-at - --config - --header 'Accept: application/vnd.oci.image.manifest.v1+json, */*' "$3" <<EOF
$authorization
EOF
    status=$?
    # 33: the server cannot go on in the middle.
    [ "$status" != 33 ] || rm -f "$1"
    [ "$status" = 0 ] || return 1
    [ "$(sha256 "$1" 2>/dev/null)" != "$2" ] || return 0
    rm -f "$1"
    echo "what the registry gives is not sha256:$2" >&2
    return 1
}

# Every string value of a key of the layers, a line each.
values() {
    grep -o "\"$1\" *: *\"[^\"]*\"" "$scratch/layers" | sed 's/"$//; s/.*"//'
}

# is_signed KEY: whether one of the signatures that cosign 2 would find is the key's, and of this image. A registry may
# be behind what was just pushed, so that whatever is wrong is asked for again.
is_signed() {
    authorize "$registry/manifests/$digest" || return 1
    get "$scratch/signatures" --config - --max-filesize 1000000 \
        --header 'Accept: application/vnd.oci.image.manifest.v1+json, */*' \
        "$registry/manifests/sha256-${digest#sha256:}.sig" <<EOF || return 1
$authorization
EOF
    tr -d '\n' <"$scratch/signatures" | sed 's/.*"layers"//' >"$scratch/layers"
    values digest >"$scratch/payloads"
    values dev.cosignproject.cosign/signature | paste "$scratch/payloads" - | head -n 8 >"$scratch/pairs"
    while read -r payload signature; do
        rm -f "$scratch/payload"
        download "$scratch/payload" "${payload#sha256:}" "$registry/blobs/$payload" || return 1
        echo "$signature" | openssl base64 -d -A >"$scratch/signature"
        if [ "$(json_string docker-manifest-digest <"$scratch/payload")" = "$digest" ] &&
            openssl dgst -sha256 -verify "$1" -signature "$scratch/signature" "$scratch/payload" >/dev/null 2>&1; then
            return 0
        fi
    done <"$scratch/pairs"
    echo "$image has no signature by the key of the VM's metadata" >&2
    return 1
}

# A power cut may come at any time: what has its name is there as a whole, and stays.
place() {
    chmod "$2" "$1.new"
    sync "$1.new"
    mv -f "$1.new" "$1"
    sync "$(dirname "$1")"
}

# Puts a file in the place of another one, which may be running.
put() {
    mkdir -p "$(dirname "$1")"
    cat >"$1.new"
    place "$1" "$2"
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
    command -v openssl >/dev/null || die "openssl is needed to check the agent's signature"
    metadata instance/attributes/krustlet-verification-key >"$scratch/key"
    say "pulling $image"
    patiently "the agent's signature" is_signed "$scratch/key"
    patiently "the agent's manifest" download "$scratch/manifest" "${digest#sha256:}" "$registry/manifests/$digest"
    grep -q "sha256:$wanted" "$scratch/manifest" || die "$image does not have the agent $wanted"
    mkdir -p "$PREFIX/bin"
    patiently "the agent" download "$AGENT.new" "$wanted" "$registry/blobs/sha256:$wanted"
    place "$AGENT" 755
}

# A word of a unit's line: systemd splits at blanks, and has a meaning of its own for % and quotes.
word() {
    printf '"%s"' "$1" | sed 's/\\/\\\\/g; s/%/%%/g'
}

# Changes with everything that the service has to be started anew for. Other keys the agent takes while it runs.
fingerprint() {
    cat "$AGENT" "$CONFIG/krustlet.env" "$CONFIG/bootstrap.kubeconfig" "$UNIT" 2>/dev/null | cksum
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
    pod_range=$(optional_metadata instance/attributes/krustlet-pod-range)
    pod_cidr=
    [ -z "$pod_range" ] || pod_cidr=$(alias_range "$pod_range")
    name=$(metadata instance/name)
    hostname=$(metadata instance/hostname)
    zone=$(metadata instance/zone)
    machine_type=$(metadata instance/machine-type)
    project=$(metadata project/project-id)
    address=$(metadata instance/network-interfaces/0/ip)
    # What a cloud controller tells of a node that waits for it; this one waits for none, and says it again by itself
    # wherever its Node was deleted.
    zone=${zone##*/}
    place=topology.kubernetes.io/zone=$zone,topology.kubernetes.io/region=${zone%-*}
    place=$place,node.kubernetes.io/instance-type=${machine_type##*/}
    # A VM without one leaves by Cloud NAT.
    external=$(optional_metadata instance/network-interfaces/0/access-configs/0/external-ip)
    # Readable by the service's own user, as is the metadata server that it comes from. The token in it ends within
    # minutes and is deleted once the node has joined.
    put "$CONFIG/bootstrap.kubeconfig" 644 <<EOF
$bootstrap
EOF
    put "$CONFIG/verification.pem" 644 <<EOF
$key
EOF
    put "$CONFIG/krustlet.env" 644 <<EOF
GCE_METADATA_HOST=${GCE_METADATA_HOST:-metadata.google.internal}
KRUSTLET_ADDRESS=$address
KRUSTLET_PORT=10250
KRUSTLET_NODE_IP=$address
${external:+KRUSTLET_EXTERNAL_IP=$external}
KRUSTLET_NODE_NAME=$name
KRUSTLET_HOSTNAME=$hostname
KRUSTLET_PROVIDER_ID=gce://$project/$zone/$name
KRUSTLET_BOOTSTRAP_FILE="$CONFIG/bootstrap.kubeconfig"
KRUSTLET_VERIFICATION_KEYS="$CONFIG/verification.pem"
KRUSTLET_REGISTRY_CREDENTIALS=gce
KRUSTLET_TRUSTED_REGISTRIES=${image%%/*}
${pod_cidr:+KRUSTLET_POD_CIDR=$pod_cidr}
NODE_LABELS=$labels,$place
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
    put "$UNIT" 644 <<EOF
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

# What is changed in the metadata of a running VM reaches the agent without a reboot.
write_watch() {
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
    ask --max-time 330 --output /dev/null --dump-header - "$attributes?recursive=true$1" | tr -d '\r' | sed -n 's/^[Ee][Tt][Aa][Gg]: *//p'
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

scratch=$(mktemp -d)
# However this run ends, the next one comes with a change of the metadata, and after a failure by itself. Not enabled: it
# would run this script at boot too, beside the one that boots.
trap 'rm -rf "$scratch"; systemctl start krustlet-metadata' EXIT
before=$(fingerprint)
write_watch
systemctl daemon-reload
install_agent
write_configuration
write_unit
systemctl daemon-reload
systemctl enable krustlet
# At a second boot it runs already, with what was written at the first. Started anew for nothing, it would start its pods
# anew.
if [ "$(fingerprint)" = "$before" ]; then
    systemctl start krustlet
else
    systemctl restart krustlet
fi
say "started"
