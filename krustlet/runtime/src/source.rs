//! From which address a guest's connections go out: its pod's own where the pod has one, so that whoever is called can tell
//! which pod calls.
//!
//! To what is neither this machine's nor of a private network they go from the machine's address: a pod's is routed within
//! its cloud's network alone.

use crate::egress_policy::is_own;
use ipnet::Ipv4Net;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use tokio::net::{TcpSocket, TcpStream};

const fn network(a: u8, b: u8, c: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), prefix)
}

/// Where pods keep their addresses on GKE, too (the defaults of its ip-masq-agent).
const KEPT: [Ipv4Net; 11] = [
    network(10, 0, 0, 8),
    network(100, 64, 0, 10),
    network(172, 16, 0, 12),
    network(192, 0, 0, 24),
    network(192, 0, 2, 24),
    network(192, 88, 99, 24),
    network(192, 168, 0, 16),
    network(198, 18, 0, 15),
    network(198, 51, 100, 24),
    network(203, 0, 113, 24),
    network(240, 0, 0, 4),
];

/// Connects, from the pod's own address if it has one.
pub async fn connect(own: Option<Ipv4Addr>, to: SocketAddr) -> io::Result<TcpStream> {
    // An IPv4 address written as an IPv6 one would go out from the machine's.
    let to = SocketAddr::new(to.ip().to_canonical(), to.port());
    match (own, to.ip()) {
        (Some(own), IpAddr::V4(ip)) if is_kept(own, ip) => {
            let socket = TcpSocket::new_v4()?;
            socket.bind((own, 0).into())?;
            socket.connect(to).await
        }
        _ => TcpStream::connect(to).await,
    }
}

fn is_kept(own: Ipv4Addr, to: Ipv4Addr) -> bool {
    // No kernel sends anything from a loopback address to another machine.
    let is_near = || KEPT.iter().any(|network| network.contains(&to));
    to.is_loopback() || (!own.is_loopback() && is_near()) || is_own(to.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn within_private_networks_the_pods_address_is_kept_and_beyond_them_it_is_the_machines() {
        let own = Ipv4Addr::new(10, 70, 0, 3);
        for near in ["10.1.2.3", "192.168.7.7", "172.31.0.1", "127.0.0.5", "100.127.0.1"] {
            assert!(is_kept(own, near.parse().unwrap()), "{near}");
        }
        for far in ["8.8.8.8", "172.32.0.1", "100.128.0.1", "169.254.169.254"] {
            assert!(!is_kept(own, far.parse().unwrap()), "{far}");
        }
        assert!(!is_kept(Ipv4Addr::new(127, 9, 0, 1), "10.255.255.1".parse().unwrap()), "from loopback");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn who_is_called_sees_the_pods_address_in_whatever_spelling_it_was_called() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let mapped = SocketAddr::new("::ffff:127.0.0.1".parse().unwrap(), to.port());
        for (own, to, seen) in [
            (None, to, "127.0.0.1"),
            (Some(Ipv4Addr::new(127, 8, 7, 6)), to, "127.8.7.6"),
            (Some(Ipv4Addr::new(127, 8, 7, 6)), mapped, "127.8.7.6"),
        ] {
            let _stream = connect(own, to).await.unwrap();
            assert_eq!(listener.accept().await.unwrap().1.ip().to_string(), seen);
        }
    }
}
