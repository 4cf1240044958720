"""The resource types that are served, a table each: property, field, type, what a change needs.

Names, defaults, and what forces a replacement are those of the official plugin (pulumi-gcp 9/10, on
google-beta).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from localcloud.plugins.gcp.fields import Field, Form, Type, Update

S, INT, I64, B = Type.STRING, Type.INT, Type.INT64, Type.BOOL
MAP, STRS, OBJ, OBJS = Type.MAP, Type.STRINGS, Type.OBJECT, Type.OBJECTS
PATCH, OWN, LOCAL = Update.PATCH, Update.OWN, Update.LOCAL


@dataclass(frozen=True)
class ResourceType:
    """A type. `item` is its path and its Pulumi id; `collection` where it is created; minutes: the default
    timeouts.
    """

    token: str
    service: str
    collection: str
    item: str
    fields: tuple[Field, ...]
    name: str | None = "name"
    minutes: tuple[int, int, int] = (20, 20, 20)  # create, update, delete
    create_query: tuple[tuple[str, str], ...] = ()  # query parameter: property

    def field(self, name: str) -> Field:
        """A property by name."""
        return next(f for f in self.fields if f.name == name)


def _out(name: str, kind: Type = S, rest: str | None = "", fields: tuple[Field, ...] = ()) -> Field:
    return Field(name, kind, rest, output=True, fields=fields)


_PROJECT = Field("project", rest=None, decided=True)
# Terraform's, which the official plugin has as it is: PREVENT refuses to delete, ABANDON deletes nothing.
_DELETION_POLICY = Field(
    "deletionPolicy", rest=None, update=LOCAL, enum=("DELETE", "PREVENT", "ABANDON"), default="DELETE"
)
_LABELS = (
    Field("labels", MAP, rest=None, update=OWN),
    _out("effectiveLabels", MAP, None),
    replace(_out("pulumiLabels", MAP, None), update=OWN),
)
_LINKS = (_out("selfLink"), _out("creationTimestamp"))

REPOSITORY = ResourceType(
    "gcp:artifactregistry/repository:Repository",
    "artifactregistry",
    "projects/{project}/locations/{location}/repositories",
    "projects/{project}/locations/{location}/repositories/{repositoryId}",
    (
        _PROJECT,
        Field("location", rest=None, decided=True),
        Field("repositoryId", rest=None, required=True),
        Field("format", required=True),
        Field("mode", default="STANDARD_REPOSITORY"),
        Field("description", update=PATCH),
        Field("kmsKeyName"),
        _DELETION_POLICY,
        Field("dockerConfig", OBJ, update=PATCH, fields=(Field("immutableTags", B, update=PATCH),)),
        *_LABELS,
        _out("name", rest=None),
        _out("createTime"),
        _out("updateTime"),
        _out("registryUri"),
    ),
    name=None,
    create_query=(("repositoryId", "repositoryId"),),
)

REPOSITORY_IAM_MEMBER = ResourceType(
    "gcp:artifactregistry/repositoryIamMember:RepositoryIamMember",
    "artifactregistry",
    "",
    "projects/{project}/locations/{location}/repositories/{repository}/{role}/{member}",
    (
        _PROJECT,
        Field("location", rest=None, decided=True),
        Field("repository", rest=None, required=True),
        Field("role", rest=None, required=True),
        Field("member", rest=None, required=True),
        _out("etag"),
    ),
    name=None,
)

PROJECT_IAM_MEMBER = ResourceType(
    "gcp:projects/iAMMember:IAMMember",
    "cloudresourcemanager",
    "",
    "{project}/{role}/{member}",
    (
        Field("project", rest=None, required=True),
        Field("role", rest=None, required=True),
        Field("member", rest=None, required=True),
        _out("etag"),
    ),
    name=None,
)

SERVICE = ResourceType(
    "gcp:projects/service:Service",
    "serviceusage",
    "",
    "{project}/{service}",
    (
        _PROJECT,
        Field("service", rest=None, required=True),
        Field("disableOnDestroy", B, rest=None, update=LOCAL, default=False),
    ),
    name=None,
)

ACCOUNT = ResourceType(
    "gcp:serviceaccount/account:Account",
    "iam",
    "projects/{project}/serviceAccounts",
    "projects/{project}/serviceAccounts/{email}",
    (
        _PROJECT,
        Field("accountId", rest=None, required=True),
        Field("displayName", update=PATCH),
        Field("description", update=PATCH),
        _DELETION_POLICY,
        Field("disabled", B, update=OWN, default=False),
        _out("email"),
        _out("name"),
        _out("uniqueId"),
        _out("member", rest=None),
    ),
    name=None,
    minutes=(5, 5, 5),
)

NETWORK = ResourceType(
    "gcp:compute/network:Network",
    "compute",
    "projects/{project}/global/networks",
    "projects/{project}/global/networks/{name}",
    (
        _PROJECT,
        Field("name"),
        Field("description"),
        Field("autoCreateSubnetworks", B, default=True),
        Field(
            "routingMode",
            rest="routingConfig.routingMode",
            update=PATCH,
            enum=("REGIONAL", "GLOBAL"),
            decided=True,
        ),
        _DELETION_POLICY,
        Field("mtu", INT, update=PATCH),
        _out("gatewayIpv4", rest="gatewayIPv4"),
        _out("numericId", rest="id"),
        _out("networkId", rest="id"),
        *_LINKS[:1],
    ),
)

SUBNETWORK = ResourceType(
    "gcp:compute/subnetwork:Subnetwork",
    "compute",
    "projects/{project}/regions/{region}/subnetworks",
    "projects/{project}/regions/{region}/subnetworks/{name}",
    (
        _PROJECT,
        Field("region", rest=None, decided=True),
        Field("name"),
        Field("network", required=True, form=Form.LINK),
        Field("ipCidrRange", update=OWN),
        Field("description"),
        Field("privateIpGoogleAccess", B, update=OWN),
        Field("purpose", update=PATCH, decided=True),
        Field("role", update=PATCH),
        _DELETION_POLICY,
        Field("stackType", update=PATCH, decided=True),
        Field(
            "secondaryIpRanges",
            OBJS,
            update=PATCH,
            fields=(Field("rangeName", required=True, update=PATCH), Field("ipCidrRange", update=PATCH)),
        ),
        _out("gatewayAddress"),
        _out("fingerprint"),
        *_LINKS,
    ),
)

_RULE = (
    Field("protocol", rest="IPProtocol", required=True, update=PATCH),
    Field("ports", STRS, update=PATCH),
)
FIREWALL = ResourceType(
    "gcp:compute/firewall:Firewall",
    "compute",
    "projects/{project}/global/firewalls",
    "projects/{project}/global/firewalls/{name}",
    (
        _PROJECT,
        Field("name"),
        Field("network", required=True, update=PATCH, form=Form.LINK),
        Field("description", update=PATCH),
        Field("direction", enum=("INGRESS", "EGRESS"), decided=True),
        Field("priority", INT, default=1000, update=PATCH),
        _DELETION_POLICY,
        Field("disabled", B, update=PATCH),
        Field("allows", OBJS, "allowed", update=PATCH, fields=_RULE),
        Field("denies", OBJS, "denied", update=PATCH, fields=_RULE),
        *(
            Field(name, STRS, update=PATCH)
            for name in (
                *("sourceRanges", "destinationRanges", "sourceTags", "targetTags"),
                *("sourceServiceAccounts", "targetServiceAccounts"),
            )
        ),
        *_LINKS,
    ),
)

ADDRESS = ResourceType(
    "gcp:compute/address:Address",
    "compute",
    "projects/{project}/regions/{region}/addresses",
    "projects/{project}/regions/{region}/addresses/{name}",
    (
        _PROJECT,
        Field("region", rest=None, decided=True),
        Field("name"),
        Field("address", decided=True),
        Field("addressType", default="EXTERNAL", enum=("INTERNAL", "EXTERNAL")),
        Field("description"),
        Field("networkTier", enum=("PREMIUM", "STANDARD"), decided=True),
        Field("network", form=Form.LINK),
        Field("subnetwork", form=Form.LINK, decided=True),
        Field("purpose", decided=True),
        _DELETION_POLICY,
        Field("prefixLength", INT, decided=True),
        *_LABELS,
        _out("labelFingerprint"),
        _out("users", STRS),
        *_LINKS,
    ),
)

ROUTER = ResourceType(
    "gcp:compute/router:Router",
    "compute",
    "projects/{project}/regions/{region}/routers",
    "projects/{project}/regions/{region}/routers/{name}",
    (
        _PROJECT,
        Field("region", rest=None, decided=True),
        Field("name"),
        Field("network", required=True, form=Form.LINK),
        Field("description", update=PATCH),
        _DELETION_POLICY,
        *_LINKS,
    ),
)

# One of the gateways in its router: no resource of its own in REST.
ROUTER_NAT = ResourceType(
    "gcp:compute/routerNat:RouterNat",
    "compute",
    "projects/{project}/regions/{region}/routers/{router}",
    "{project}/{region}/{router}/{name}",
    (
        _PROJECT,
        Field("region", rest=None, decided=True),
        Field("router", rest=None, required=True, form=Form.LINK),
        Field("name"),
        Field("natIpAllocateOption", update=PATCH, enum=("MANUAL_ONLY", "AUTO_ONLY"), decided=True),
        Field("natIps", STRS, update=PATCH),
        Field(
            "sourceSubnetworkIpRangesToNat",
            required=True,
            update=PATCH,
            enum=(
                "ALL_SUBNETWORKS_ALL_IP_RANGES",
                "ALL_SUBNETWORKS_ALL_PRIMARY_IP_RANGES",
                "LIST_OF_SUBNETWORKS",
            ),
        ),
        Field("minPortsPerVm", INT, update=PATCH, decided=True),
        Field("enableEndpointIndependentMapping", B, update=PATCH, decided=True),
        _DELETION_POLICY,
    ),
)

DISK = ResourceType(
    "gcp:compute/disk:Disk",
    "compute",
    "projects/{project}/zones/{zone}/disks",
    "projects/{project}/zones/{zone}/disks/{name}",
    (
        _PROJECT,
        Field("zone", rest=None, decided=True),
        Field("name"),
        Field("description"),
        Field("size", I64, rest="sizeGb", update=OWN, decided=True),
        Field("type", rest=None, default="pd-standard"),
        Field("image", rest=None, form=Form.IMAGE),
        Field("snapshot", rest="sourceSnapshot"),
        Field("architecture", decided=True),
        Field("physicalBlockSizeBytes", I64, decided=True),
        *_LABELS,
        _DELETION_POLICY,
        _out("diskId", rest="id"),
        _out("labelFingerprint"),
        _out("sourceImageId"),
        _out("users", STRS),
        _out("lastAttachTimestamp"),
        _out("lastDetachTimestamp"),
        *_LINKS,
    ),
)

INSTANCE = ResourceType(
    "gcp:compute/instance:Instance",
    "compute",
    "projects/{project}/zones/{zone}/instances",
    "projects/{project}/zones/{zone}/instances/{name}",
    (
        _PROJECT,
        Field("zone", rest=None, decided=True),
        Field("name"),
        Field("machineType", rest=None, required=True, update=OWN),
        Field("description", update=OWN),
        Field("hostname"),
        Field("canIpForward", B, update=OWN),
        Field("minCpuPlatform", update=OWN),
        Field("allowStoppingForUpdate", B, rest=None, update=LOCAL),
        Field("deletionProtection", B, update=OWN, default=False),
        _DELETION_POLICY,
        Field(
            "bootDisk",
            OBJ,
            rest=None,
            required=True,
            fields=(
                Field("autoDelete", B, default=True, update=OWN),
                Field("deviceName", decided=True),
                Field("mode", default="READ_WRITE", enum=("READ_WRITE", "READ_ONLY")),
                Field("source", form=Form.LINK, decided=True),
                Field(
                    "initializeParams",
                    OBJ,
                    fields=(
                        Field("image", rest="sourceImage", form=Form.IMAGE, decided=True),
                        Field("size", I64, rest="diskSizeGb", update=OWN, decided=True),
                        Field("type", rest="diskType", decided=True),
                        Field("labels", MAP, update=OWN),
                    ),
                ),
            ),
        ),
        Field(
            "networkInterfaces",
            OBJS,
            required=True,
            fields=(
                Field("network", update=OWN, form=Form.LINK, decided=True),
                Field("subnetwork", update=OWN, form=Form.LINK, decided=True),
                Field("networkIp", rest="networkIP", update=OWN, decided=True),
                Field("stackType", update=OWN, decided=True),
                Field(
                    "accessConfigs",
                    OBJS,
                    update=OWN,
                    fields=(
                        Field("natIp", rest="natIP", update=OWN, decided=True),
                        Field("networkTier", update=OWN, decided=True),
                    ),
                ),
                Field(
                    "aliasIpRanges",
                    OBJS,
                    update=OWN,
                    fields=(
                        Field("ipCidrRange", update=OWN),
                        Field("subnetworkRangeName", update=OWN),
                    ),
                ),
                _out("name"),
            ),
        ),
        Field("metadata", MAP, rest=None, update=OWN),
        Field("metadataStartupScript", rest=None, update=OWN),
        Field("tags", STRS, rest=None, update=OWN),
        *_LABELS,
        Field(
            "serviceAccount",
            OBJ,
            rest=None,
            update=OWN,
            fields=(Field("email", update=OWN), Field("scopes", STRS, required=True, update=OWN)),
        ),
        Field(
            "scheduling",
            OBJ,
            update=OWN,
            fields=(
                Field("automaticRestart", B, default=True, update=OWN),
                Field("onHostMaintenance", update=OWN),
                Field("preemptible", B),
                Field("provisioningModel"),
                Field("instanceTerminationAction", update=OWN),
            ),
        ),
        Field(
            "shieldedInstanceConfig",
            OBJ,
            update=OWN,
            fields=(
                Field("enableSecureBoot", B, default=False, update=OWN),
                Field("enableVtpm", B, default=True, update=OWN),
                Field("enableIntegrityMonitoring", B, default=True, update=OWN),
            ),
        ),
        _out("instanceId", rest="id"),
        _out("cpuPlatform"),
        _out("currentStatus", rest="status"),
        _out("labelFingerprint"),
        _out("metadataFingerprint", rest="metadata.fingerprint"),
        _out("tagsFingerprint", rest="tags.fingerprint"),
        *_LINKS,
    ),
)

_TAINT = (
    Field("key", required=True, update=OWN),
    Field("value", required=True, update=OWN),
    Field("effect", required=True, update=OWN),
)
_NODE_CONFIG = Field(
    "nodeConfig",
    OBJ,
    rest="config",
    fields=(
        Field("machineType", update=OWN),
        Field("diskSizeGb", INT, update=OWN),
        Field("diskType", update=OWN),
        Field("imageType", update=OWN),
        Field("oauthScopes", STRS),
        Field("serviceAccount"),
        Field("labels", MAP, update=OWN),
        Field("resourceLabels", MAP, update=OWN),
        Field("tags", STRS, update=OWN),
        Field("taints", OBJS, update=OWN, fields=_TAINT),
        Field("metadata", MAP),
        Field("minCpuPlatform"),
        Field("preemptible", B),
        Field("spot", B),
        Field("workloadMetadataConfig", OBJ, update=OWN, fields=(Field("mode", required=True, update=OWN),)),
        Field(
            "shieldedInstanceConfig",
            OBJ,
            fields=(Field("enableSecureBoot", B), Field("enableIntegrityMonitoring", B)),
        ),
    ),
)

CLUSTER = ResourceType(
    "gcp:container/cluster:Cluster",
    "container",
    "projects/{project}/locations/{location}/clusters",
    "projects/{project}/locations/{location}/clusters/{name}",
    (
        _PROJECT,
        Field("location", rest=None, decided=True),
        Field("name"),
        Field("description"),
        Field("deletionProtection", B, rest=None, default=True, update=LOCAL),
        _DELETION_POLICY,
        Field("initialNodeCount", INT),
        Field("removeDefaultNodePool", B, rest=None, update=LOCAL),
        Field("network", default="default", form=Form.LINK),
        Field("subnetwork", form=Form.LINK, decided=True),
        Field("networkingMode", rest=None, enum=("VPC_NATIVE", "ROUTES")),
        Field("minMasterVersion", rest=None, update=OWN),
        Field("clusterIpv4Cidr"),
        Field("enableAutopilot", B, rest="autopilot.enabled"),
        Field("loggingService", update=OWN),
        Field("monitoringService", update=OWN),
        Field("nodeLocations", STRS, rest="locations", update=OWN),
        Field("resourceLabels", MAP, update=OWN),
        Field(
            "ipAllocationPolicy",
            OBJ,
            fields=(
                Field("clusterSecondaryRangeName"),
                Field("servicesSecondaryRangeName"),
                Field("clusterIpv4CidrBlock"),
                Field("servicesIpv4CidrBlock"),
                Field("stackType", update=OWN, decided=True),
            ),
        ),
        replace(_NODE_CONFIG, rest="nodeConfig"),
        Field(
            "releaseChannel",
            OBJ,
            update=OWN,
            fields=(Field("channel", required=True, update=OWN),),
        ),
        Field(
            "masterAuthorizedNetworksConfig",
            OBJ,
            update=OWN,
            fields=(
                Field(
                    "cidrBlocks",
                    OBJS,
                    update=OWN,
                    fields=(
                        Field("cidrBlock", required=True, update=OWN),
                        Field("displayName", update=OWN),
                    ),
                ),
                Field("gcpPublicCidrsAccessEnabled", B, update=OWN, decided=True),
            ),
        ),
        Field(
            "maintenancePolicy",
            OBJ,
            update=OWN,
            fields=(
                Field(
                    "dailyMaintenanceWindow",
                    OBJ,
                    rest="window.dailyMaintenanceWindow",
                    update=OWN,
                    fields=(Field("startTime", required=True, update=OWN), _out("duration")),
                ),
            ),
        ),
        Field("workloadIdentityConfig", OBJ, update=OWN, fields=(Field("workloadPool", update=OWN),)),
        _out("endpoint"),
        _out("masterVersion", rest="currentMasterVersion"),
        _out("servicesIpv4Cidr"),
        *_LABELS[1:],
        _out("labelFingerprint"),
        _out("selfLink"),
        _out(
            "masterAuth",
            OBJ,
            fields=(
                _out("clusterCaCertificate"),
                _out("clientCertificate"),
                _out("clientKey"),
            ),
        ),
    ),
    minutes=(40, 60, 40),
)

NODE_POOL = ResourceType(
    "gcp:container/nodePool:NodePool",
    "container",
    "projects/{project}/locations/{location}/clusters/{cluster}/nodePools",
    "projects/{project}/locations/{location}/clusters/{cluster}/nodePools/{name}",
    (
        _PROJECT,
        Field("location", rest=None, decided=True),
        Field("cluster", rest=None, required=True),
        Field("name"),
        Field("nodeCount", INT, rest=None, update=OWN),
        Field("initialNodeCount", INT),
        Field("ignoreNodeCountChanges", B, rest=None, update=LOCAL),
        Field(
            "autoscaling",
            OBJ,
            update=OWN,
            fields=(
                Field("minNodeCount", INT, update=OWN),
                Field("maxNodeCount", INT, update=OWN),
                Field("totalMinNodeCount", INT, update=OWN),
                Field("totalMaxNodeCount", INT, update=OWN),
                Field("locationPolicy", update=OWN),
            ),
        ),
        Field(
            "management",
            OBJ,
            update=OWN,
            fields=(Field("autoRepair", B, update=OWN), Field("autoUpgrade", B, update=OWN)),
        ),
        Field("maxPodsPerNode", INT, rest=None),
        Field(
            "networkConfig",
            OBJ,
            update=OWN,
            fields=(Field("enablePrivateNodes", B, update=OWN, decided=True),),
        ),
        _NODE_CONFIG,
        Field("nodeLocations", STRS, rest="locations", update=OWN),
        Field("version", update=OWN),
        Field(
            "upgradeSettings",
            OBJ,
            update=OWN,
            fields=(
                Field("maxSurge", INT, update=OWN),
                Field("maxUnavailable", INT, update=OWN),
                Field("strategy", update=OWN),
            ),
        ),
        _DELETION_POLICY,
        _out("instanceGroupUrls", STRS),
        _out("managedInstanceGroupUrls", STRS, rest=None),
    ),
    minutes=(30, 30, 30),
)

TYPES = {
    t.token: t
    for t in (
        *(
            REPOSITORY,
            REPOSITORY_IAM_MEMBER,
            PROJECT_IAM_MEMBER,
            SERVICE,
            ACCOUNT,
            NETWORK,
            SUBNETWORK,
            FIREWALL,
            ADDRESS,
            ROUTER,
            ROUTER_NAT,
        ),
        *(DISK, INSTANCE, CLUSTER, NODE_POOL),
    )
}
