//! The command line: Krustlet's own flags and environment variables, and those that this agent adds.

use crate::image_gc::Thresholds;
use crate::pod::fields::nanos;
use crate::pod::limits;
use crate::pressure;
use anyhow::{Context, bail, ensure};
use clap::{Parser, ValueEnum};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use krustlet_runtime::{Builder, EgressConfig, IpNet, Ipv4Net, PublicKey, Verification};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// A Kubernetes node agent that runs WebAssembly.
#[derive(Debug, Clone, Parser)]
#[command(version, about)]
pub struct Options {
    /// Address that the agent's HTTPS API listens on [default: the node's address]
    #[arg(long = "addr", env = "KRUSTLET_ADDRESS")]
    address: Option<IpAddr>,

    /// Port of the agent's HTTPS API
    #[arg(long, env = "KRUSTLET_PORT", default_value_t = 3000)]
    pub port: u16,

    /// The node's address, which pods are served on [default: the one that routes to the API server]
    #[arg(long, env = "KRUSTLET_NODE_IP")]
    pub node_ip: Option<IpAddr>,

    /// An address that reaches the node from outside
    #[arg(long, env = "KRUSTLET_EXTERNAL_IP")]
    pub external_ip: Option<IpAddr>,

    /// The machine's DNS name [default: its host name]
    #[arg(long, env = "KRUSTLET_HOSTNAME")]
    hostname: Option<String>,

    /// Name of the Node object [default: the host name in lower case]
    #[arg(long, env = "KRUSTLET_NODE_NAME")]
    node_name: Option<String>,

    /// Range of IPv4 addresses, one for each pod; this machine must hold all of it as local [default: pods are served on
    /// ports of the node's address]
    #[arg(long, env = "KRUSTLET_POD_CIDR", value_parser = parse_range)]
    pub pod_cidr: Option<Ipv4Net>,

    /// Labels for the Node object: key=value,…
    #[arg(long, env = "NODE_LABELS", value_delimiter = ',', value_parser = parse_label)]
    node_labels: Vec<(String, String)>,

    /// How many pods the node takes
    #[arg(long, env = "MAX_PODS", default_value_t = 500)]
    pub max_pods: u32,

    /// Percent of the disk from which on images that no pod uses are removed
    #[arg(long, env = "IMAGE_GC_HIGH_THRESHOLD", default_value_t = 85, value_parser = clap::value_parser!(u8).range(..=100))]
    image_gc_high_threshold: u8,

    /// Percent of the disk down to which they are removed
    #[arg(long, env = "IMAGE_GC_LOW_THRESHOLD", default_value_t = 80, value_parser = clap::value_parser!(u8).range(..=100))]
    image_gc_low_threshold: u8,

    /// How little may be left before pods are evicted; allocatableMemory.available is as memory.available if not given
    /// [default: memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%]
    #[arg(long, env = "KRUSTLET_EVICTION_HARD")]
    eviction_hard: Option<String>,

    /// How long the node tells of a pressure, and keeps pods out, after it was last under it
    #[arg(long, env = "KRUSTLET_EVICTION_PRESSURE_TRANSITION_PERIOD", default_value = "5m", value_parser = parse_duration)]
    pub eviction_pressure_transition_period: Duration,

    /// Directory for keys, images, compiled code, volumes and logs [default: ~/.krustlet]
    #[arg(long, env = "KRUSTLET_DATA_DIR")]
    data_dir: Option<PathBuf>,

    /// Kubeconfig with the bootstrap token that the node joins the cluster with
    #[arg(long, env = "KRUSTLET_BOOTSTRAP_FILE", default_value = "/etc/kubernetes/bootstrap-kubelet.conf")]
    pub bootstrap_file: PathBuf,

    /// Serving certificate in PEM [default: one that the cluster signs]
    #[arg(long, env = "KRUSTLET_CERT_FILE", requires = "private_key_file")]
    pub cert_file: Option<PathBuf>,

    /// Private key of the serving certificate in PEM
    #[arg(long, env = "KRUSTLET_PRIVATE_KEY_FILE", requires = "cert_file")]
    pub private_key_file: Option<PathBuf>,

    /// Where the joined kubeconfig is written [default: <data-dir>/config/kubeconfig]
    #[arg(long, env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,

    /// Registries that speak plain http, host[:port],…; they may be at any address, also this machine's
    #[arg(long, env = "KRUSTLET_INSECURE_REGISTRIES", value_delimiter = ',')]
    pub insecure_registries: Vec<String>,

    /// Registries besides Google's that may see the machine's own credentials, host[:port],…; they may be at any address,
    /// and speak plain http on a loopback one
    #[arg(long, env = "KRUSTLET_TRUSTED_REGISTRIES", value_delimiter = ',')]
    pub trusted_registries: Vec<String>,

    /// Identity of the machine at its cloud, e.g. gce://PROJECT/ZONE/NAME
    #[arg(long, env = "KRUSTLET_PROVIDER_ID")]
    pub provider_id: Option<String>,

    /// PEM files of the public keys that may sign modules, comma separated; read again when they change
    #[arg(long, env = "KRUSTLET_VERIFICATION_KEYS", value_delimiter = ',')]
    verification_keys: Vec<PathBuf>,

    /// Run modules that nobody signed; for development only
    #[arg(long, env = "KRUSTLET_ALLOW_UNSIGNED", conflicts_with = "verification_keys")]
    allow_unsigned: bool,

    /// Where modules must have SLSA provenance by a key that may sign them, and from which builder: NAMESPACE=BUILDER,…; `*` is
    /// every namespace that is not named, and a builder that ends in `*` is the beginning of one
    #[arg(long, env = "KRUSTLET_REQUIRE_PROVENANCE", value_delimiter = ',', value_parser = parse_builder, conflicts_with = "allow_unsigned")]
    pub require_provenance: Vec<(String, Builder)>,

    /// Where registry credentials come from when a pod brings none
    #[arg(long, env = "KRUSTLET_REGISTRY_CREDENTIALS", value_enum, default_value_t = RegistryCredentials::None)]
    pub registry_credentials: RegistryCredentials,

    /// Directories below which pods may mount hostPath volumes, comma separated
    #[arg(long, env = "KRUSTLET_HOSTPATH_ALLOW", value_delimiter = ',')]
    pub hostpath_allow: Vec<PathBuf>,

    /// Networks that guests may connect to though they are refused otherwise (loopback, link-local, the node itself),
    /// CIDR or address, comma separated. The API server and the metadata server need an entry for their very address
    #[arg(long, env = "KRUSTLET_GUEST_EGRESS_NETWORKS", value_delimiter = ',', value_parser = parse_network)]
    pub guest_egress_networks: Vec<IpNet>,

    /// Certificate authorities in PEM that guests' outbound https trusts beside the public ones
    #[arg(long, env = "KRUSTLET_GUEST_CA_FILE")]
    pub guest_ca_file: Option<PathBuf>,

    /// Bytes that all guests together may take, e.g. 2Gi [default: what the machine or its control group has, less what
    /// the system and idle instances need]
    #[arg(long, env = "KRUSTLET_GUEST_MEMORY", value_parser = parse_bytes)]
    pub guest_memory: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RegistryCredentials {
    /// Anonymous pulls
    None,
    /// The token of the VM's service account, from its metadata server
    Gce,
}

/// The options with every default filled in that does not depend on the API server.
#[derive(Debug, Clone)]
pub struct Names {
    pub hostname: String,
    pub node_name: String,
    pub data_dir: PathBuf,
    pub kubeconfig: PathBuf,
    pub image_gc: Thresholds,
    pub eviction: pressure::Thresholds,
}

impl Options {
    /// Resolves the names and places that the agent lives under.
    ///
    /// Fails when a default is needed that the machine does not give, when the node name is no DNS subdomain, or when the
    /// thresholds of image collection are the wrong way round.
    pub fn names(&self) -> anyhow::Result<Names> {
        let hostname = match &self.hostname {
            Some(name) => name.clone(),
            None => sysinfo::System::host_name()
                .ok()
                .filter(|name| !name.is_empty())
                .context("failed to learn the host name; pass --hostname")?,
        };
        let node_name = match &self.node_name {
            Some(name) => name.clone(),
            None => hostname.to_lowercase(),
        };
        ensure!(
            is_dns_subdomain(&node_name),
            "node name {node_name:?} is not a DNS subdomain (lower case letters, digits, '-' and '.'); pass --node-name"
        );
        let data_dir = match &self.data_dir {
            Some(directory) => directory.clone(),
            None => {
                std::env::home_dir().context("failed to find the home directory; pass --data-dir")?.join(".krustlet")
            }
        };
        let kubeconfig = match &self.kubeconfig {
            Some(path) => path.clone(),
            None => data_dir.join("config").join("kubeconfig"),
        };
        let eviction = pressure::Thresholds::parse(self.eviction_hard.as_deref().unwrap_or_default())
            .context("--eviction-hard is unusable")?;
        Ok(Names { hostname, node_name, data_dir, kubeconfig, image_gc: self.image_gc()?, eviction })
    }

    /// The address of the HTTPS API.
    pub fn listen_address(&self, node_ip: IpAddr) -> SocketAddr {
        SocketAddr::new(self.address.unwrap_or(node_ip), self.port)
    }

    /// The labels given, the last one winning when a key is given twice.
    pub fn node_labels(&self) -> BTreeMap<String, String> {
        self.node_labels.iter().cloned().collect()
    }

    /// What guests may reach. Fails when the bundle cannot be read.
    pub fn egress(&self) -> anyhow::Result<EgressConfig> {
        let ca_bundle = match &self.guest_ca_file {
            None => None,
            Some(path) => Some(
                std::fs::read_to_string(path)
                    .with_context(|| format!("failed to read --guest-ca-file {}", path.display()))?,
            ),
        };
        // The agent's own API listens on --addr; the others lead to the node.
        let node_addresses = [self.address, self.node_ip, self.external_ip].into_iter().flatten().collect();
        Ok(EgressConfig { networks: self.guest_egress_networks.clone(), node_addresses, ca_bundle })
    }

    /// Fails when nothing lies between the thresholds.
    fn image_gc(&self) -> anyhow::Result<Thresholds> {
        let (high, low) = (self.image_gc_high_threshold, self.image_gc_low_threshold);
        ensure!(low < high, "--image-gc-low-threshold {low} is not below --image-gc-high-threshold {high}");
        Ok(Thresholds { high, low })
    }

    /// Reads the public keys. Fails when there is none and unsigned modules were not allowed.
    pub fn verification(&self) -> anyhow::Result<Verification> {
        if self.allow_unsigned {
            return Ok(Verification::AllowUnsigned);
        }
        if self.verification_keys.is_empty() {
            bail!(
                "no key to check modules with: pass --verification-keys FILE,… or, for development, --allow-unsigned"
            );
        }
        let mut keys = Vec::with_capacity(self.verification_keys.len());
        for path in &self.verification_keys {
            let pem = std::fs::read_to_string(path)
                .with_context(|| format!("failed to read verification key {}", path.display()))?;
            let key = PublicKey::from_pem(&pem)
                .map_err(|cause| anyhow::anyhow!("verification key {} is unusable: {cause}", path.display()))?;
            keys.push(key);
        }
        Ok(Verification::Keys(keys))
    }
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not key=value"))?;
    if key.trim().is_empty() {
        return Err(format!("{text:?} has an empty key"));
    }
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

fn parse_builder(text: &str) -> Result<(String, Builder), String> {
    let (namespace, builder) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAMESPACE=BUILDER"))?;
    let namespace = namespace.trim();
    if namespace != "*" && (namespace.contains('.') || !is_dns_subdomain(namespace)) {
        return Err(format!("{namespace:?} is neither a namespace nor `*`"));
    }
    Ok((namespace.to_owned(), builder.parse()?))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    limits::duration(text).ok_or_else(|| format!("{text:?} is no duration, such as 5m or 30s"))
}

/// A network, or an address alone.
fn parse_network(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    let network = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => {
            text.parse().map_err(|_| format!("{text:?} is neither a network such as 10.0.0.0/8 nor an address"))?
        }
    };
    Ok(network.trunc())
}

fn parse_range(text: &str) -> Result<Ipv4Net, String> {
    let range: Ipv4Net = text.trim().parse().map_err(|_| format!("{text:?} is no range such as 10.1.2.0/24"))?;
    if range != range.trunc() {
        return Err(format!("{text:?} is an address within {0}; write {0}", range.trunc()));
    }
    Ok(range)
}

/// A quantity of memory as Kubernetes writes it.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let quantity = Quantity(text.trim().to_owned());
    nanos(&quantity)
        .and_then(|nanos| u64::try_from(nanos / 1_000_000_000).ok())
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("{text:?} is not an amount of memory such as 2Gi"))
}

/// RFC 1123, as the API server checks the name of a Node.
fn is_dns_subdomain(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Options {
        Options::parse_from(std::iter::once("krustlet").chain(arguments.iter().copied()))
    }

    #[test]
    fn labels_are_split_at_the_first_equals_sign() {
        let options = parse(&["--node-labels", "a=b,c=d=e,f="]);
        let labels = options.node_labels();
        assert_eq!(labels["a"], "b");
        assert_eq!(labels["c"], "d=e");
        assert_eq!(labels["f"], "");
    }

    #[test]
    fn the_api_listens_on_the_node_address_unless_told_otherwise() {
        let node_ip: IpAddr = "127.0.0.9".parse().unwrap();
        let options = parse(&["--port", "10250"]);
        assert_eq!(options.listen_address(node_ip).to_string(), "127.0.0.9:10250");
        let options = parse(&["--addr", "127.0.0.1"]);
        assert_eq!(options.listen_address(node_ip).to_string(), "127.0.0.1:3000");
    }

    #[test]
    fn the_thresholds_of_image_collection_are_in_order() {
        let thresholds = parse(&[]).image_gc().unwrap();
        assert_eq!((thresholds.high, thresholds.low), (85, 80));
        let error = parse(&["--image-gc-high-threshold=80"]).image_gc().unwrap_err();
        assert!(error.to_string().contains("--image-gc-low-threshold 80"), "{error}");
        assert!(Options::try_parse_from(["krustlet", "--image-gc-high-threshold=101"]).is_err());
    }

    #[test]
    fn builders_are_named_by_namespace_and_what_is_none_is_refused() {
        let given = "prod=https://github.com/shop/*, *=urn:a=b";
        let required = parse(&["--require-provenance", given]).require_provenance;
        let shown: Vec<_> = required.iter().map(|(namespace, builder)| format!("{namespace}={builder}")).collect();
        assert_eq!(shown, ["prod=https://github.com/shop/*", "*=urn:a=b"]);
        for wrong in ["prod", "=urn:a", "Prod=urn:a", "a.b=urn:a", "prod=", "prod=a*b", "**=urn:a"] {
            let flag = format!("--require-provenance={wrong}");
            assert!(Options::try_parse_from(["krustlet", &flag]).is_err(), "{wrong}");
        }
        let unsigned = ["krustlet", "--allow-unsigned", "--require-provenance=*=urn:a"];
        assert!(Options::try_parse_from(unsigned).is_err());
    }

    #[test]
    fn networks_for_guests_are_opened_by_name_and_what_is_none_is_refused() {
        let options = parse(&["--guest-egress-networks", "10.1.2.3/8, 127.0.0.1,fd00::/8"]);
        let networks: Vec<String> = options.egress().unwrap().networks.iter().map(ToString::to_string).collect();
        assert_eq!(networks, ["10.0.0.0/8", "127.0.0.1/32", "fd00::/8"]);
        assert!(parse(&[]).egress().unwrap().networks.is_empty());
        assert!(Options::try_parse_from(["krustlet", "--guest-egress-networks=localhost"]).is_err());
        assert!(parse(&["--guest-ca-file=/does/not/exist"]).egress().is_err());
    }

    #[test]
    fn the_range_of_the_pods_addresses_is_one_of_ipv4_written_as_the_api_server_wants_it() {
        assert_eq!(parse(&["--pod-cidr=10.1.2.0/24"]).pod_cidr.unwrap().to_string(), "10.1.2.0/24");
        assert_eq!(parse(&[]).pod_cidr, None);
        for (bad, why) in [("10.1.2.3/24", "write 10.1.2.0/24"), ("10.1.2.0", "no range"), ("fd00::/64", "no range")] {
            let error = Options::try_parse_from(["krustlet", "--pod-cidr", bad]).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn the_memory_of_guests_is_a_quantity() {
        assert_eq!(parse(&["--guest-memory=2Gi"]).guest_memory, Some(2 << 30));
        assert_eq!(parse(&[]).guest_memory, None);
        assert!(Options::try_parse_from(["krustlet", "--guest-memory=much"]).is_err());
    }

    #[test]
    fn a_node_without_keys_refuses_to_start() {
        let error = parse(&[]).verification().unwrap_err().to_string();
        assert!(error.contains("--verification-keys"), "{error}");
        assert!(matches!(parse(&["--allow-unsigned"]).verification().unwrap(), Verification::AllowUnsigned));
    }

    #[test]
    fn a_node_name_that_the_api_server_would_refuse_is_refused_at_the_start() {
        let error = parse(&["--node-name", "Wasm_1", "--hostname", "h"]).names().unwrap_err();
        assert!(error.to_string().contains("--node-name"));
        assert!(parse(&["--node-name", "wasm-1.zone", "--hostname", "h"]).names().is_ok());
    }
}
