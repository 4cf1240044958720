//! Addresses that only this machine can reach: its loopback interface, its link, its cloud's metadata server, its own
//! addresses. Whoever chooses a name that the node connects to could otherwise read what listens there (server-side request
//! forgery). Checked on the address that is connected to, not on the name, which may resolve differently each time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// The metadata servers of Google and Amazon on IPv6, which are not link-local there.
const METADATA_V6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)];
/// Alibaba's, which is in the range of carrier-grade NAT.
const METADATA_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);

/// Whether `address` is one of those, in whatever form it is written.
pub fn is_private_to_node(address: IpAddr) -> bool {
    is_private(address, routes_to_itself)
}

fn is_private(address: IpAddr, is_own: impl Fn(IpAddr) -> bool) -> bool {
    match address {
        IpAddr::V4(v4) => is_local_v4(v4) || is_own(address),
        IpAddr::V6(v6) => match embedded_v4(v6) {
            Some(v4) => is_local_v4(v4) || is_own(IpAddr::V4(v4)),
            None => is_local_v6(v6) || is_own(address),
        },
    }
}

/// Whether it is this machine's own: the kernel answers from the address that was asked. Sends nothing, and knows the
/// addresses of today.
fn routes_to_itself(address: IpAddr) -> bool {
    let any: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let source = UdpSocket::bind(any).and_then(|socket| {
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address)
}

fn is_local_v4(address: Ipv4Addr) -> bool {
    // "This network": Linux takes 0.0.0.0 for its own address.
    address.octets()[0] == 0
        || address.is_loopback()
        || address.is_link_local()
        || address.is_broadcast()
        || address.is_multicast()
        || address == METADATA_V4
}

fn is_local_v6(address: Ipv6Addr) -> bool {
    address.is_loopback()
        || address.is_unspecified()
        || address.is_unicast_link_local()
        || address.is_multicast()
        || METADATA_V6.contains(&address)
}

/// The IPv4 address that a gateway, or the kernel itself, takes this one for.
fn embedded_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let segments = address.segments();
    let at = |index: usize| {
        let [a, b] = [segments.get(index)?, segments.get(index + 1)?].map(|segment| segment.to_be_bytes());
        Some(Ipv4Addr::new(a[0], a[1], b[0], b[1]))
    };
    match segments {
        // ::1 and :: are addresses of IPv6.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => None,
        // Mapped, compatible, and translated (RFC 2765).
        [0, 0, 0, 0, 0, 0xffff | 0, _, _] | [0, 0, 0, 0, 0xffff, 0, _, _] => at(6),
        // NAT64, well-known and local.
        [0x64, 0xff9b, 0 | 1, ..] => at(6),
        // 6to4.
        [0x2002, ..] => at(1),
        // Teredo keeps it inverted.
        [0x2001, 0, ..] => at(6).map(|inverted| Ipv4Addr::from(!u32::from(inverted))),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const OWN: [IpAddr; 2] =
        [IpAddr::V4(Ipv4Addr::new(10, 132, 0, 7)), IpAddr::V6(Ipv6Addr::new(0xfd00, 7, 0, 0, 0, 0, 0, 7))];

    fn private(address: &str) -> bool {
        is_private(address.parse().unwrap(), |address| OWN.contains(&address))
    }

    /// Every spelling of an IPv4 address inside an IPv6 one.
    fn embeddings(v4: Ipv4Addr) -> Vec<String> {
        let [a, b, c, d] = v4.octets();
        let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        vec![
            format!("::ffff:{v4}"),
            format!("::{v4}"),
            format!("::ffff:0:{high:x}:{low:x}"),
            format!("64:ff9b::{high:x}:{low:x}"),
            format!("64:ff9b:1::{high:x}:{low:x}"),
            format!("2002:{high:x}:{low:x}::1"),
            format!("2001:0:1:2:3:4:{:x}:{:x}", !high, !low),
        ]
    }

    #[test]
    fn what_only_the_node_can_reach_is_private_in_every_spelling() {
        for v4 in [
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "169.254.0.1",
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "224.0.0.251",
            "100.100.100.200",
            "10.132.0.7",
        ] {
            assert!(private(v4), "{v4}");
            for v6 in embeddings(v4.parse().unwrap()) {
                // ::0.0.0.1 would be ::1, which is private by itself.
                assert!(private(&v6), "{v4} as {v6}");
            }
        }
        for v6 in ["::1", "::", "fe80::1", "febf::1", "ff02::1", "fd20:ce::254", "fd00:ec2::254", "fd00:7::7"] {
            assert!(private(v6), "{v6}");
        }
    }

    #[test]
    fn the_kernel_knows_which_addresses_are_its_own() {
        assert!(routes_to_itself("127.0.0.1".parse().unwrap()));
        // Of a documentation range: nobody has it.
        assert!(!routes_to_itself("192.0.2.1".parse().unwrap()));
        assert!(!routes_to_itself("2001:db8::1".parse().unwrap()));
    }

    #[test]
    fn what_others_can_reach_too_is_not() {
        for v4 in ["8.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "128.0.0.1", "169.253.255.255"] {
            assert!(!private(v4), "{v4}");
            for v6 in embeddings(v4.parse().unwrap()) {
                assert!(!private(&v6), "{v4} as {v6}");
            }
        }
        for v6 in ["2a00:1450:4001::1", "fd00::1", "2001:db8::1", "fec0::1"] {
            assert!(!private(v6), "{v6}");
        }
    }
}
