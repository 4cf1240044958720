"""Which changed fields make the official plugin replace an object instead of updating it.

The tables are those of pulumi-kubernetes v4 (provider/pkg/provider/forcenew.go), as plain data.
"""

from __future__ import annotations

from localcloud.plugins.kubernetes.cluster import Kind
from localcloud.plugins.values import Change, Path, matches

_ALWAYS = ("metadata.name", "metadata.namespace")
_CONTAINER = (
    *("args", "command", "env", "image", "imagePullPolicy", "lifecycle", "livenessProbe", "ports"),
    *("readinessProbe", "resources", "securityContext", "stdin", "stdinOnce", "terminationMessagePath"),
    *("terminationMessagePolicy", "tty", "volumeDevices", "volumeMounts", "workingDir"),
)
_POD = (
    *("affinity", "automountServiceAccountToken", "dnsConfig", "dnsPolicy", "enableServiceLinks"),
    *("hostAliases", "hostIPC", "hostNetwork", "hostPID", "hostname", "imagePullSecrets", "nodeName"),
    *("nodeSelector", "overhead", "preemptionPolicy", "priority", "priorityClassName", "readinessGates"),
    *("restartPolicy", "runtimeClassName", "schedulerName", "securityContext", "serviceAccount"),
    *("serviceAccountName", "shareProcessNamespace", "subdomain", "terminationGracePeriodSeconds", "volumes"),
    *(f"{where}.*.{name}" for where in ("containers", "initContainers") for name in _CONTAINER),
)
_VOLUME = (
    *(
        "awsElasticBlockStore",
        "azureDisk",
        "azureFile",
        "cephfs",
        "cinder",
        "csi",
        "fc",
        "flexVolume",
        "flocker",
    ),
    *("gcePersistentDisk", "glusterfs", "hostPath", "iscsi", "local", "nfs", "photonPersistentDisk"),
    *("portworxVolume", "quobyte", "rbd", "scaleIO", "storageos", "vsphereVolume"),
)
_STATEFUL_SET = (
    "podManagementPolicy",
    "revisionHistoryLimit",
    "selector",
    "serviceName",
    "volumeClaimTemplates",
)
_SPEC: dict[Kind, tuple[str, ...]] = {
    Kind("v1", "Pod"): _POD,
    Kind("v1", "PersistentVolume"): _VOLUME,
    Kind("v1", "PersistentVolumeClaim"): ("accessModes", "selector", "storageClassName", "volumeName"),
    Kind("v1", "ResourceQuota"): ("scopes",),
    Kind("v1", "Service"): ("clusterIP",),
    Kind("apps/v1", "DaemonSet"): ("selector",),
    Kind("apps/v1", "Deployment"): ("selector",),
    Kind("apps/v1", "StatefulSet"): _STATEFUL_SET,
    Kind("batch/v1", "Job"): ("completions", "parallelism", "selector", "template"),
}
_WHOLE: dict[Kind, tuple[str, ...]] = {
    Kind("policy/v1beta1", "PodDisruptionBudget"): ("spec",),
    Kind("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"): ("roleRef",),
    Kind("rbac.authorization.k8s.io/v1", "RoleBinding"): ("roleRef",),
    Kind("storage.k8s.io/v1", "StorageClass"): ("parameters", "provisioner"),
    Kind("v1", "Secret"): ("type",),
}
_DATA: dict[Kind, tuple[str, ...]] = {
    Kind("v1", "Secret"): ("data", "stringData"),
    Kind("v1", "ConfigMap"): ("data", "binaryData"),
}


def replacing(kind: Kind, changes: dict[Path, Change], *, mutable_data: bool) -> frozenset[Path]:
    """Those of the changes that need a new object. `mutable_data`: Secret and ConfigMap data may change in
    place.
    """
    patterns = [*_ALWAYS, *(f"spec.{name}" for name in _SPEC.get(kind, ())), *_WHOLE.get(kind, ())]
    if not mutable_data:
        patterns += _DATA.get(kind, ())
    return frozenset(path for path in changes if any(matches(path, pattern) for pattern in patterns))
