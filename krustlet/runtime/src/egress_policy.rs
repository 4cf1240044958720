//! Which addresses guests may connect to.
//!
//! It stops a pod's author from reaching, through the node, what only the node is meant to reach: its own services, its
//! neighbours on the link, the API server as a client from the node, the metadata server that gives out the machine's account
//! token. It is the second of two layers. The first, `allowed_hosts`, is the pod's own list of names; since whoever writes
//! that list also chooses what its names resolve to, this one judges the address that a connection is about to be made to,
//! and nothing that was resolved before.

use ipnet::IpNet;
use parking_lot::RwLock;
use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Where clouds serve machine identities. Most are link-local too; they are told apart because opening a network that
/// contains one of them does not open it.
const METADATA_SERVERS: [IpAddr; 6] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)), // Google Cloud
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)), // AWS
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42)),  // Scaleway
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),                 // Alibaba Cloud
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),                   // Azure
];
const METADATA_NAMES: [&str; 3] = ["metadata.google.internal", "metadata.goog", "instance-data.ec2.internal"];

/// Why an address is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    Loopback,
    LinkLocal,
    Unspecified,
    Multicast,
    Broadcast,
    Reserved,
    Node,
    ApiServer,
    MetadataServer,
}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Loopback => "a loopback address of the node",
            Self::LinkLocal => "a link-local address",
            Self::Unspecified => "an unspecified address",
            Self::Multicast => "a multicast address",
            Self::Broadcast => "the broadcast address",
            Self::Reserved => "a reserved address",
            Self::Node => "an address of the node",
            Self::ApiServer => "the API server",
            Self::MetadataServer => "a metadata server",
        })
    }
}

impl Refused {
    /// Whether only an entry for the single address opens it: a network is opened for what else is in it.
    fn needs_an_entry_of_its_own(self) -> bool {
        matches!(self, Self::ApiServer | Self::MetadataServer)
    }
}

/// What a node refuses to its guests.
#[derive(Debug, Default)]
pub struct EgressPolicy {
    /// Networks that the node's operator opened.
    open: Vec<IpNet>,
    /// Addresses that lead to the node and that its kernel does not know, such as the external one of a VM.
    node: Vec<IpAddr>,
    api_server: RwLock<ApiServer>,
}

#[derive(Debug, Default)]
struct ApiServer {
    name: Option<String>,
    addresses: HashSet<IpAddr>,
}

impl EgressPolicy {
    pub fn new(open: Vec<IpNet>, node: Vec<IpAddr>) -> Self {
        Self { open, node: node.iter().map(IpAddr::to_canonical).collect(), api_server: RwLock::default() }
    }

    /// Takes note of where the API server is; what it was known under before stays refused.
    pub fn add_api_server(&self, name: &str, addresses: impl IntoIterator<Item = IpAddr>) {
        let mut server = self.api_server.write();
        server.name = Some(name.trim_end_matches('.').to_ascii_lowercase());
        server.addresses.extend(addresses.into_iter().map(|address| address.to_canonical()));
    }

    /// Whether a connection to this address may be made. Ask right before it is made, and make it to this very address.
    pub fn permits(&self, address: IpAddr) -> Result<(), Refused> {
        self.judge(address, is_own)
    }

    /// Whether a name may be asked for at all, as far as the name alone tells.
    pub fn permits_name(&self, name: &str) -> Result<(), Refused> {
        let name = name.trim_end_matches('.');
        let opened =
            |mut addresses: &mut dyn Iterator<Item = IpAddr>| (&mut addresses).any(|address| self.opens_alone(address));
        if METADATA_NAMES.iter().any(|known| known.eq_ignore_ascii_case(name))
            && !opened(&mut METADATA_SERVERS.into_iter())
        {
            return Err(Refused::MetadataServer);
        }
        let server = self.api_server.read();
        if server.name.as_deref().is_some_and(|known| known.eq_ignore_ascii_case(name))
            && !opened(&mut server.addresses.iter().copied())
        {
            return Err(Refused::ApiServer);
        }
        Ok(())
    }

    fn judge(&self, address: IpAddr, is_own: impl Fn(IpAddr) -> bool) -> Result<(), Refused> {
        for reading in readings(address) {
            if let Some(refused) = self.refused(reading, &is_own) {
                let open = match refused.needs_an_entry_of_its_own() {
                    true => self.opens_alone(reading),
                    false => self.open.iter().any(|network| network.contains(&reading)),
                };
                if !open {
                    return Err(refused);
                }
            }
        }
        Ok(())
    }

    fn refused(&self, address: IpAddr, is_own: impl Fn(IpAddr) -> bool) -> Option<Refused> {
        if METADATA_SERVERS.contains(&address) {
            return Some(Refused::MetadataServer);
        }
        if self.api_server.read().addresses.contains(&address) {
            return Some(Refused::ApiServer);
        }
        let kind = match address {
            IpAddr::V4(address) => kind_of_v4(address),
            IpAddr::V6(address) => kind_of_v6(address),
        };
        kind.or_else(|| (self.node.contains(&address) || is_own(address)).then_some(Refused::Node))
    }

    fn opens_alone(&self, address: IpAddr) -> bool {
        self.open.contains(&IpNet::from(address))
    }
}

/// Whether an address leads to what only this machine can reach. A registry of such an address is named by the node's
/// operator, or not asked.
pub(crate) fn is_private_to_node(address: IpAddr) -> bool {
    EgressPolicy::default().permits(address).is_err()
}

fn kind_of_v4(address: Ipv4Addr) -> Option<Refused> {
    match address.octets() {
        // The whole of it means "this host" to some kernels.
        [0, ..] => Some(Refused::Unspecified),
        [127, ..] => Some(Refused::Loopback),
        [169, 254, ..] => Some(Refused::LinkLocal),
        [224..=239, ..] => Some(Refused::Multicast),
        [255, 255, 255, 255] => Some(Refused::Broadcast),
        [240..=255, ..] => Some(Refused::Reserved),
        _ => None,
    }
}

fn kind_of_v6(address: Ipv6Addr) -> Option<Refused> {
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some(Refused::Unspecified),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some(Refused::Loopback),
        // fe80::/10, and fec0::/10, which had the same purpose.
        [0xfe80..=0xfeff, ..] => Some(Refused::LinkLocal),
        [0xff00..=0xffff, ..] => Some(Refused::Multicast),
        // NAT64 of a network's own (RFC 8215): which bits hold the IPv4 address is that network's choice.
        [0x64, 0xff9b, 1, ..] => Some(Refused::Reserved),
        _ => None,
    }
}

/// An address, and the IPv4 addresses that it may lead to by being translated or tunnelled.
fn readings(address: IpAddr) -> impl Iterator<Item = IpAddr> {
    let embedded = match address {
        IpAddr::V4(_) => [None; 2],
        IpAddr::V6(address) => embedded(address),
    };
    std::iter::once(address).chain(embedded.into_iter().flatten().map(IpAddr::V4))
}

fn embedded(address: Ipv6Addr) -> [Option<Ipv4Addr>; 2] {
    let v4 = |high: u16, low: u16| Some(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)));
    match address.segments() {
        // ::1 and :: are themselves.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => [None, None],
        // Compatible (::a.b.c.d), mapped (::ffff:a.b.c.d), translated (::ffff:0:a.b.c.d), NAT64 (64:ff9b::a.b.c.d).
        [0, 0, 0, 0, 0, 0, high, low]
        | [0, 0, 0, 0, 0, 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => [v4(high, low), None],
        // 6to4.
        [0x2002, high, low, ..] => [v4(high, low), None],
        // Teredo: its server, and its client behind a mask.
        [0x2001, 0, high, low, _, _, client_high, client_low] => [v4(high, low), v4(!client_high, !client_low)],
        // ISATAP.
        [_, _, _, _, 0 | 0x200, 0x5efe, high, low] => [v4(high, low), None],
        _ => [None, None],
    }
}

/// Whether the kernel would deliver to this machine: for its own addresses it chooses the same one as the sender's. Asked each
/// time, since addresses come and go, and ranges that are local altogether are on no interface. Sends nothing.
pub(crate) fn is_own(address: IpAddr) -> bool {
    let any: SocketAddr = match address {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let sender = || {
        let socket = UdpSocket::bind(any)?;
        socket.connect((address, 9))?;
        socket.local_addr()
    };
    // What has no route cannot be connected to either.
    sender().is_ok_and(|sender| sender.ip() == address)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn judged(policy: &EgressPolicy, address: &str) -> Result<(), Refused> {
        policy.judge(address.parse().unwrap(), |_| false)
    }

    fn refused(address: &str) -> Option<Refused> {
        judged(&EgressPolicy::default(), address).err()
    }

    fn open(networks: &[&str]) -> EgressPolicy {
        EgressPolicy::new(networks.iter().map(|network| network.parse().unwrap()).collect(), Vec::new())
    }

    /// Every spelling of an IPv4 address that some translator or tunnel takes for it.
    fn spellings(address: Ipv4Addr) -> Vec<Ipv6Addr> {
        let number = u32::from(address);
        let (high, low) = ((number >> 16) as u16, number as u16);
        vec![
            Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
            Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, high, low),
            Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, high, low),
            Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
            Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
            Ipv6Addr::new(0x2001, 0, 0x808, 0x808, 0, 0, !high, !low),
            Ipv6Addr::new(0x2001, 0, high, low, 0, 0, !0x808, !0x808),
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0x5efe, high, low),
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0x200, 0x5efe, high, low),
        ]
    }

    #[test]
    fn public_and_private_addresses_are_permitted() {
        for address in ["8.8.8.8", "10.1.2.3", "192.168.0.1", "172.16.0.1", "2001:4860:4860::8888", "fd12::1"] {
            assert_eq!(refused(address), None, "{address}");
        }
    }

    #[test]
    fn the_nodes_loopback_is_refused() {
        for address in ["127.0.0.1", "127.255.255.254", "::1"] {
            assert_eq!(refused(address), Some(Refused::Loopback), "{address}");
        }
    }

    #[test]
    fn what_is_on_the_link_is_refused() {
        for address in ["169.254.0.1", "169.254.169.253", "fe80::1", "febf::1", "fec0::1"] {
            assert_eq!(refused(address), Some(Refused::LinkLocal), "{address}");
        }
    }

    #[test]
    fn addresses_of_nobody_and_of_many_are_refused() {
        for (address, reason) in [
            ("0.0.0.0", Refused::Unspecified),
            ("0.1.2.3", Refused::Unspecified),
            ("::", Refused::Unspecified),
            ("224.0.0.1", Refused::Multicast),
            ("239.255.255.255", Refused::Multicast),
            ("ff02::1", Refused::Multicast),
            ("255.255.255.255", Refused::Broadcast),
            ("240.0.0.1", Refused::Reserved),
        ] {
            assert_eq!(refused(address), Some(reason), "{address}");
        }
    }

    #[test]
    fn the_metadata_server_of_each_family_is_refused_under_each_name() {
        for address in
            ["169.254.169.254", "fd20:ce::254", "fd00:ec2::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"]
        {
            assert_eq!(refused(address), Some(Refused::MetadataServer), "{address}");
        }
        let policy = EgressPolicy::default();
        for name in ["metadata.google.internal", "METADATA.google.internal.", "metadata.goog"] {
            assert_eq!(policy.permits_name(name), Err(Refused::MetadataServer), "{name}");
        }
        assert_eq!(policy.permits_name("metadata.example.com"), Ok(()));
    }

    #[test]
    fn ipv4_inside_ipv6_is_judged_as_what_it_leads_to() {
        for (address, reason) in [
            (Ipv4Addr::new(127, 0, 0, 1), Refused::Loopback),
            (Ipv4Addr::new(169, 254, 169, 254), Refused::MetadataServer),
            (Ipv4Addr::new(169, 254, 1, 1), Refused::LinkLocal),
            (Ipv4Addr::new(224, 0, 0, 251), Refused::Multicast),
        ] {
            for spelling in spellings(address) {
                assert_eq!(refused(&spelling.to_string()), Some(reason), "{spelling}");
            }
        }
        for spelling in spellings(Ipv4Addr::new(8, 8, 4, 4)) {
            assert_eq!(refused(&spelling.to_string()), None, "{spelling}");
        }
        assert_eq!(refused("64:ff9b:1::1"), Some(Refused::Reserved), "a NAT64 that nobody can read");
    }

    #[test]
    fn no_spelling_of_a_refused_address_is_permitted_and_opening_it_opens_them_all() {
        let mut random = Random::new(7);
        for _ in 0..20_000 {
            let address = Ipv4Addr::from(random.next() as u32);
            let alone = refused(&address.to_string());
            let opened = open(&[&format!("{address}/32")]);
            assert_eq!(judged(&opened, &address.to_string()), Ok(()), "{address}");
            for spelling in spellings(address) {
                // ::0.0.0.0 and ::0.0.0.1 are addresses of IPv6.
                if u32::from(address) > 1 {
                    assert_eq!(refused(&spelling.to_string()), alone, "{spelling}");
                    assert_eq!(judged(&opened, &spelling.to_string()), Ok(()), "{spelling}");
                }
            }
        }
    }

    #[test]
    fn the_api_server_is_refused_by_name_and_under_every_address_that_it_ever_had() {
        let policy = EgressPolicy::default();
        policy.add_api_server("Api.Example.", ["203.0.113.7".parse().unwrap()]);
        policy.add_api_server("api.example", ["::ffff:203.0.113.8".parse().unwrap()]);
        for address in ["203.0.113.7", "203.0.113.8", "::ffff:203.0.113.7", "64:ff9b::203.0.113.8"] {
            assert_eq!(judged(&policy, address), Err(Refused::ApiServer), "{address}");
        }
        assert_eq!(policy.permits_name("api.EXAMPLE."), Err(Refused::ApiServer));
        assert_eq!(judged(&policy, "203.0.113.9"), Ok(()));
    }

    #[test]
    fn an_opened_network_is_open_but_for_the_api_server_and_the_metadata_server_in_it() {
        let policy = open(&["127.0.0.0/8", "169.254.0.0/16"]);
        policy.add_api_server("127.0.0.7", ["127.0.0.7".parse().unwrap()]);
        assert_eq!(judged(&policy, "127.0.0.1"), Ok(()));
        assert_eq!(judged(&policy, "::1"), Err(Refused::Loopback));
        assert_eq!(judged(&policy, "169.254.7.7"), Ok(()));
        assert_eq!(judged(&policy, "127.0.0.7"), Err(Refused::ApiServer));
        assert_eq!(policy.permits_name("127.0.0.7"), Err(Refused::ApiServer));
        assert_eq!(judged(&policy, "169.254.169.254"), Err(Refused::MetadataServer));
        let policy = open(&["127.0.0.7/32", "169.254.169.254/32"]);
        policy.add_api_server("127.0.0.7", ["127.0.0.7".parse().unwrap()]);
        assert_eq!(judged(&policy, "127.0.0.7"), Ok(()));
        assert_eq!(judged(&policy, "169.254.169.254"), Ok(()));
        assert_eq!(policy.permits_name("metadata.google.internal"), Ok(()));
    }

    #[test]
    fn the_nodes_own_addresses_are_refused_those_that_it_was_told_and_those_that_its_kernel_knows() {
        let policy = EgressPolicy::new(Vec::new(), vec!["203.0.113.7".parse().unwrap()]);
        assert_eq!(judged(&policy, "203.0.113.7"), Err(Refused::Node));
        let own: IpAddr = "198.51.100.1".parse().unwrap();
        assert_eq!(policy.judge(own, |address| address == own), Err(Refused::Node));
        assert_eq!(policy.judge("::ffff:198.51.100.1".parse().unwrap(), |address| address == own), Err(Refused::Node));
        assert!(is_own("127.0.0.1".parse().unwrap()));
        assert!(!is_own("192.0.2.1".parse().unwrap()));
    }
}
