//! Every reason string that users and controllers see, in one place. Where Kubernetes has a word, it is Kubernetes' word.

/// Why a container waits. Those of a failed pull, load or start come from the runtime's own errors.
pub mod waiting {
    pub const CONTAINER_CREATING: &str = "ContainerCreating";
    pub const POD_INITIALIZING: &str = "PodInitializing";
    pub const CRASH_LOOP_BACK_OFF: &str = "CrashLoopBackOff";
    pub const ERR_IMAGE_PULL: &str = "ErrImagePull";
    pub const IMAGE_PULL_BACK_OFF: &str = "ImagePullBackOff";
    pub const PORT_IN_USE: &str = "PortInUse";
    pub const NO_POD_ADDRESS: &str = "NoPodAddress";
    pub const CREATE_CONTAINER_CONFIG_ERROR: &str = "CreateContainerConfigError";
    pub const CREATE_CONTAINER_ERROR: &str = "CreateContainerError";
}

/// Why a container ended.
pub mod terminated {
    pub const COMPLETED: &str = "Completed";
    pub const ERROR: &str = "Error";
    pub const OOM_KILLED: &str = "OOMKilled";
    pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
    pub const CONTAINER_CANNOT_RUN: &str = "ContainerCannotRun";
}

/// Why a pod is in its phase.
pub mod pod {
    pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
    pub const EVICTED: &str = "Evicted";
    pub const OUT_OF_PODS: &str = "OutOfpods";
}

/// Conditions of a pod and their reasons.
pub mod condition {
    pub const POD_SCHEDULED: &str = "PodScheduled";
    pub const READY_TO_START: &str = "PodReadyToStartContainers";
    pub const INITIALIZED: &str = "Initialized";
    pub const CONTAINERS_READY: &str = "ContainersReady";
    pub const READY: &str = "Ready";
    /// Ours: whether the running module is the one that the spec names.
    pub const IMAGE_CURRENT: &str = "krustlet.dev/ImageCurrent";

    /// The pod ends for what befell it, and not for what it did.
    pub const DISRUPTION_TARGET: &str = "DisruptionTarget";

    pub const TERMINATION_BY_KUBELET: &str = "TerminationByKubelet";
    pub const CONTAINERS_NOT_INITIALIZED: &str = "ContainersNotInitialized";
    pub const CONTAINERS_NOT_READY: &str = "ContainersNotReady";
    pub const READINESS_GATES_NOT_READY: &str = "ReadinessGatesNotReady";
    pub const POD_COMPLETED: &str = "PodCompleted";
    pub const POD_FAILED: &str = "PodFailed";
    pub const NODE_SHUTDOWN: &str = "NodeShutdown";
}

/// Events.
pub mod event {
    pub const PULLING: &str = "Pulling";
    pub const PULLED: &str = "Pulled";
    pub const CREATED: &str = "Created";
    pub const STARTED: &str = "Started";
    pub const KILLING: &str = "Killing";
    pub const BACK_OFF: &str = "BackOff";
    pub const FAILED: &str = "Failed";
    pub const FAILED_PULL_SECRET: &str = "FailedToRetrieveImagePullSecret";
    /// The kubelet's word for a pod that gets no address, among other things.
    pub const FAILED_POD_SANDBOX: &str = "FailedCreatePodSandBox";
    pub const FAILED_MOUNT: &str = "FailedMount";
    pub const FAILED_PRE_STOP_HOOK: &str = "FailedPreStopHook";
    pub const FAILED_POST_START_HOOK: &str = "FailedPostStartHook";
    /// Ours: a port of the container is of a kind that is not served.
    pub const PORT_NOT_SERVED: &str = "PortNotServed";
    /// Ours: `kubectl debug` added a container.
    pub const EPHEMERAL_CONTAINER_NOT_RUN: &str = "EphemeralContainerNotRun";
    /// Ours: the agent's own work on the pod failed by a bug.
    pub const WORKER_FAILED: &str = "PodWorkerFailed";
    /// Ours: what a NetworkPolicy says is not done for the pod, or not all of it.
    pub const POLICY_NOT_KEPT: &str = "NetworkPolicyNotKept";
    /// Ours: the pod waits until it is known who may connect to it.
    pub const POLICIES_UNKNOWN: &str = "NetworkPoliciesUnknown";
    pub const UNHEALTHY: &str = "Unhealthy";
    pub const UPDATED: &str = "ImageUpdated";
    pub const FAILED_UPDATE: &str = "FailedImageUpdate";
    pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
    pub const NODE_STARTING: &str = "Starting";
    pub const NODE_SHUTDOWN: &str = "Shutdown";
    pub const FREE_DISK_SPACE_FAILED: &str = "FreeDiskSpaceFailed";
    /// Ours: nobody has renewed the node's client certificate, though it is time.
    pub const CERTIFICATE_EXPIRING: &str = "ClientCertificateExpiring";
    /// Ours: modules are judged by other keys from now on, or by those of before because the new ones are unusable.
    pub const VERIFICATION_KEYS_CHANGED: &str = "VerificationKeysChanged";
    pub const VERIFICATION_KEYS_UNUSABLE: &str = "VerificationKeysUnusable";
}

/// Conditions of the node and their reasons.
pub mod node {
    pub const READY: &str = "Ready";
    pub const MEMORY_PRESSURE: &str = "MemoryPressure";
    pub const DISK_PRESSURE: &str = "DiskPressure";
    pub const PID_PRESSURE: &str = "PIDPressure";
    /// Ours: the node will be out of the cluster unless somebody approves its certificate request.
    pub const CERTIFICATE_EXPIRING: &str = "krustlet.dev/ClientCertificateExpiring";

    /// Ours: pods take connections whatever NetworkPolicies say, or by what was known of them.
    pub const POLICIES_NOT_KEPT: &str = "krustlet.dev/NetworkPoliciesNotKept";

    pub const KUBELET_READY: &str = "KubeletReady";
    pub const KUBELET_NOT_READY: &str = "KubeletNotReady";
    pub const SUFFICIENT_MEMORY: &str = "KubeletHasSufficientMemory";
    pub const INSUFFICIENT_MEMORY: &str = "KubeletHasInsufficientMemory";
    pub const NO_DISK_PRESSURE: &str = "KubeletHasNoDiskPressure";
    pub const DISK_PRESSURE_REASON: &str = "KubeletHasDiskPressure";
    pub const SUFFICIENT_PID: &str = "KubeletHasSufficientPID";
    pub const CERTIFICATE_IS_KEPT: &str = "ClientCertificateIsKept";
    pub const POLICIES_ARE_KEPT: &str = "NetworkPoliciesAreKept";
    pub const MAY_NOT_READ: &str = "NodeMayNotRead";
    pub const RENEWAL_NOT_APPROVED: &str = "RenewalNotApproved";
}
