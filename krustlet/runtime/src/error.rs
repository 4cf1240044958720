//! What can go wrong on the way from an image name to a running guest. Every error carries the short reason that an
//! operator sees as a container's waiting reason, and a message that says what failed, on what, and what to do.

/// Why an image could not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    #[error("image name {image:?} is not valid: {cause}")]
    InvalidName { image: String, cause: String },
    #[error("image {image} is not on this node and its pull policy is Never; use IfNotPresent or Always")]
    NeverPull { image: String },
    #[error("failed to pull {image}: {cause}")]
    Pull { image: String, cause: String, permanent: bool },
    #[error("refused {image}: {cause}")]
    Signature { image: String, cause: String },
    #[error("{image} is no usable wasm artifact: {cause}")]
    InvalidImage { image: String, cause: String },
}

impl PullError {
    /// The waiting reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidName { .. } => "InvalidImageName",
            Self::NeverPull { .. } => "ErrImageNeverPull",
            Self::Pull { .. } => "ErrImagePull",
            Self::Signature { .. } => "SignatureValidationFailed",
            Self::InvalidImage { .. } => "InvalidImage",
        }
    }

    /// Whether trying again without a change of the image, its signature or the node is pointless.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::InvalidName { .. } | Self::NeverPull { .. } | Self::InvalidImage { .. } => true,
            Self::Pull { permanent, .. } => *permanent,
            Self::Signature { .. } => false,
        }
    }
}

/// Why a pulled image could not be made ready to run.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LoadError {
    #[error("module {digest} cannot be run: {cause}")]
    InvalidModule { digest: String, cause: String },
    #[error("module {digest} imports {import}, which this node does not offer{hint}")]
    UnsupportedImport { digest: String, import: String, hint: String },
    #[error("the node has no memory for module {digest}: {cause}")]
    NoMemory { digest: String, cause: String },
    #[error("failed to load module {digest}: {cause}")]
    Internal { digest: String, cause: String },
}

impl LoadError {
    /// The waiting reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidModule { .. } => "InvalidImage",
            Self::UnsupportedImport { .. } => "UnsupportedImport",
            Self::NoMemory { .. } | Self::Internal { .. } => "CreateContainerError",
        }
    }

    /// Whether trying again with the same image is pointless.
    pub fn is_permanent(&self) -> bool {
        !matches!(self, Self::NoMemory { .. } | Self::Internal { .. })
    }
}

/// Why a loaded module could not be started.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StartError {
    #[error(
        "address {address} is already in use on this node; choose another containerPort or remove the pod that holds it"
    )]
    PortInUse { address: std::net::SocketAddr },
    /// What the pod asks for means nothing or cannot be given.
    #[error("container {container} is not configured right: {cause}")]
    Config { container: String, cause: String },
    #[error("failed to create container {container}: {cause}")]
    Create { container: String, cause: String, permanent: bool },
}

impl StartError {
    /// The waiting reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::PortInUse { .. } => "PortInUse",
            Self::Config { .. } => "CreateContainerConfigError",
            Self::Create { .. } => "CreateContainerError",
        }
    }

    /// Whether trying again with the same specification is pointless.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::PortInUse { .. } => false,
            Self::Config { .. } => true,
            Self::Create { permanent, .. } => *permanent,
        }
    }
}
