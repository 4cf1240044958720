//! Where the node connects to for a pod: to the pod itself, and else to where the pod's guests may connect to.
//!
//! The `host` of a probe or a hook is for the pod's author to choose, and the connection is the node's: with the node's
//! loopback, its link and its metadata server at hand, as the kubelet's is. Whether it succeeded is something that an author
//! learns.

use krustlet_runtime::EgressPolicy;
use std::io::{Error, ErrorKind, Result};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

/// Names that may be resolved at once for all pods: each holds a thread, which nothing can call back.
static LOOKUPS: Semaphore = Semaphore::const_new(32);

#[derive(Debug, Clone)]
pub struct Reach(Option<(IpAddr, Arc<EgressPolicy>)>);

impl Reach {
    /// For what no pod has a hand in.
    pub const ANYWHERE: Self = Self(None);

    /// For a pod that is at this address.
    pub fn of_pod(address: IpAddr, policy: Arc<EgressPolicy>) -> Self {
        Self(Some((address, policy)))
    }

    /// Connects to the first address of the host that is permitted and answers; takes as long as that takes.
    pub async fn connect(&self, host: &str, port: u16) -> Result<TcpStream> {
        let mut failed = Error::new(ErrorKind::NotFound, "the name has no address");
        for address in self.resolve(host, port).await? {
            let connecting = async {
                self.judge(address.ip())?;
                TcpStream::connect(address).await
            };
            match connecting.await {
                Ok(stream) => return Ok(stream),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    fn judge(&self, address: IpAddr) -> Result<()> {
        match &self.0 {
            Some((own, policy)) if address.to_canonical() != *own => policy.permits(address).map_err(|refused| {
                let why = format!("{address} is {refused}, where the node does not go for a pod");
                Error::new(ErrorKind::PermissionDenied, why)
            }),
            _ => Ok(()),
        }
    }

    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>> {
        if let Ok(address) = host.parse() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        if let Some((_, policy)) = &self.0 {
            policy.permits_name(host).map_err(|refused| {
                let why = format!("{host} is {refused}, where the node does not go for a pod");
                Error::new(ErrorKind::PermissionDenied, why)
            })?;
        }
        let permit = LOOKUPS.acquire().await.map_err(Error::other)?;
        let host = host.to_owned();
        let lookup = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            (host.as_str(), port).to_socket_addrs().map(Vec::from_iter)
        });
        lookup.await.map_err(Error::other).flatten()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    async fn server() -> (TcpListener, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    fn pod(address: &str, open: &[&str]) -> Reach {
        let open = open.iter().map(|network| network.parse().unwrap()).collect();
        Reach::of_pod(address.parse().unwrap(), Arc::new(EgressPolicy::new(open, Vec::new())))
    }

    #[tokio::test]
    async fn a_pod_is_reached_wherever_it_is_and_nothing_else_of_the_node_in_any_spelling() {
        let (_listener, port) = server().await;
        assert!(pod("127.0.0.1", &[]).connect("127.0.0.1", port).await.is_ok());
        for host in ["127.0.0.1", "localhost", "::ffff:127.0.0.1", "127.1", "2130706433", "0x7f000001", "0.0.0.0"] {
            let error = pod("127.0.0.2", &[]).connect(host, port).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{host}: {error}");
        }
        for host in ["169.254.169.254", "metadata.google.internal", "fd20:ce::254", "fe80::1"] {
            let error = pod("127.0.0.2", &["127.0.0.0/8"]).connect(host, port).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{host}: {error}");
        }
    }

    #[tokio::test]
    async fn what_the_node_opens_to_guests_is_open_here_too() {
        let (_listener, port) = server().await;
        for host in ["127.0.0.1", "localhost"] {
            assert!(pod("127.0.0.2", &["127.0.0.0/8", "::1/128"]).connect(host, port).await.is_ok(), "{host}");
            assert!(Reach::ANYWHERE.connect(host, port).await.is_ok(), "{host}");
        }
    }
}
