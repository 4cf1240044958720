//! Which hosts a pod says that it calls: `host`, `host:port`, `*.domain` or an address.
//!
//! Names are compared as DNS does it: without regard to case and to a dot at the end, in their ASCII form (`xn--…`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The host of a URL, in the one form in which hosts are compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    Address(IpAddr),
    Name(String),
}

impl Host {
    /// Reads a host as it stands in a URL, an IPv6 address in brackets.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(inside) = text.strip_prefix('[') {
            let inside = inside.strip_suffix(']').ok_or("a bracket is not closed")?;
            let address: Ipv6Addr = inside.parse().map_err(|_| "no IPv6 address is in the brackets")?;
            return Ok(Self::Address(address.into()));
        }
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Address(address.into()));
        }
        let name = idna::domain_to_ascii(text).map_err(|_| "it is no domain name")?;
        let name = name.strip_suffix('.').unwrap_or(&name);
        if name.is_empty() || name.len() > 253 {
            return Err("it is no domain name".into());
        }
        for label in name.split('.') {
            // Underscores are in no host name of RFC 1123 and in many of the field.
            let usable = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            if label.is_empty() || label.len() > 63 || !label.bytes().all(usable) {
                return Err("it is no domain name".into());
            }
        }
        // 127.1, 0x7f.0.0.1 and 2130706433 are addresses to some resolvers.
        let last = name.rsplit('.').next().unwrap_or_default();
        let hexadecimal =
            last.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if hexadecimal || last.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err("it is neither an IPv4 address of four decimal numbers nor a name".into());
        }
        Ok(Self::Name(name.to_owned()))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(IpAddr::V6(address)) => write!(formatter, "[{address}]"),
            Self::Address(address) => write!(formatter, "{address}"),
            Self::Name(name) => formatter.write_str(name),
        }
    }
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub host: Host,
    pub port: u16,
    pub tls: bool,
}

impl Target {
    /// The error says why the URL is not usable.
    pub fn of(uri: &http::Uri) -> Result<Self, String> {
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err("its scheme is neither http nor https".into()),
        };
        let authority = uri.authority().ok_or("it names no host")?.as_str();
        // A user part would make the host's name ambiguous to a reader of the list.
        if authority.contains('@') {
            return Err("it names a user".into());
        }
        let (host, port) = split(authority)?;
        let port = port.unwrap_or(if tls { 443 } else { 80 });
        Ok(Self { host: Host::parse(host)?, port, tls })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}://{}:{}", if self.tls { "https" } else { "http" }, self.host, self.port)
    }
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`.
fn split(authority: &str) -> Result<(&str, Option<u16>), String> {
    let end_of_host = match authority.starts_with('[') {
        true => authority.find(']').map_or(authority.len(), |bracket| bracket + 1),
        false => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, rest) = authority.split_at_checked(end_of_host).unwrap_or((authority, ""));
    let port = match rest.strip_prefix(':') {
        None if rest.is_empty() => None,
        // "host:" is the same as "host" (RFC 3986).
        Some("") => None,
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            Some(digits.parse().ok().filter(|port| *port != 0).ok_or("its port is not between 1 and 65535")?)
        }
        _ => return Err("what follows the host is no port".into()),
    };
    Ok((host, port))
}

/// An entry of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHost {
    pattern: Pattern,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Host(Host),
    /// `.example.com`: every name below it.
    Below(String),
}

impl AllowedHost {
    pub fn parse(entry: &str) -> Result<Self, String> {
        Self::read(entry.trim()).map_err(|cause| {
            format!("allowed host {entry:?} is neither \"host\" nor \"host:port\" nor \"*.domain\": {cause}")
        })
    }

    fn read(entry: &str) -> Result<Self, String> {
        if entry.contains("://") || entry.contains('/') {
            return Err("it is a URL; leave out the scheme and the path".into());
        }
        if entry.contains('@') {
            return Err("it names a user".into());
        }
        // Without brackets nothing can follow it, so that it is not ambiguous.
        if let Ok(address) = entry.parse::<Ipv6Addr>() {
            return Ok(Self { pattern: Pattern::Host(Host::Address(address.into())), port: None });
        }
        let (host, port) = split(entry)?;
        let pattern = match host.strip_prefix("*.") {
            None if host.contains('*') => {
                return Err("a wildcard stands for whole labels, at the front only, as in *.example.com".into());
            }
            None => Pattern::Host(Host::parse(host)?),
            Some(domain) => match Host::parse(domain)? {
                Host::Name(domain) => Pattern::Below(format!(".{domain}")),
                Host::Address(_) => return Err("an address has no names below it".into()),
            },
        };
        Ok(Self { pattern, port })
    }

    pub fn allows(&self, target: &Target) -> bool {
        let host = match (&self.pattern, &target.host) {
            (Pattern::Host(allowed), host) => allowed == host,
            (Pattern::Below(domain), Host::Name(name)) => name.len() > domain.len() && name.ends_with(domain),
            (Pattern::Below(_), Host::Address(_)) => false,
        };
        host && self.port.is_none_or(|port| port == target.port)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn allows(entry: &str, uri: &str) -> bool {
        let uri: http::Uri = uri.parse().unwrap();
        Target::of(&uri).is_ok_and(|target| AllowedHost::parse(entry).unwrap().allows(&target))
    }

    #[test]
    fn names_are_the_same_whatever_their_case_their_last_dot_and_their_script() {
        for entry in ["example.com", "Example.COM", "example.com.", " example.com "] {
            for uri in ["https://example.com/", "http://EXAMPLE.com./path", "https://example.com:8443/"] {
                assert!(allows(entry, uri), "{entry} {uri}");
            }
        }
        for entry in ["bücher.example", "BÜCHER.example", "xn--bcher-kva.example"] {
            assert!(allows(entry, "https://xn--bcher-kva.example/"), "{entry}");
            assert!(allows(entry, "https://XN--BCHER-KVA.example./"), "{entry}");
        }
    }

    #[test]
    fn no_other_name_is_meant() {
        for uri in [
            "https://evil.example.com/",
            "https://example.com.evil/",
            "https://example.co/",
            "https://xexample.com/",
            "https://user@example.com/",
            "https://example.com@evil.example/",
        ] {
            assert!(!allows("example.com", uri), "{uri}");
        }
    }

    #[test]
    fn a_listed_port_is_the_only_one_and_each_scheme_has_its_own() {
        assert!(allows("example.com:443", "https://example.com/"));
        assert!(allows("example.com:443", "https://example.com:443/"));
        assert!(allows("example.com:80", "http://example.com/"));
        assert!(!allows("example.com:443", "http://example.com/"));
        assert!(!allows("127.0.0.1:8080", "http://127.0.0.1:8081/"));
    }

    #[test]
    fn a_wildcard_stands_for_one_label_or_more_and_never_for_none() {
        for uri in ["https://a.example.com/", "https://a.b.example.com/", "https://A.EXAMPLE.com.:443/"] {
            assert!(allows("*.example.com", uri), "{uri}");
            assert!(allows("*.Example.com.:443", uri), "{uri}");
        }
        for uri in
            ["https://example.com/", "https://aexample.com/", "https://a.example.com.evil/", "https://.example.com/"]
        {
            assert!(!allows("*.example.com", uri), "{uri}");
        }
        assert!(!allows("*.0.0.1.example", "http://127.0.0.1/"));
    }

    #[test]
    fn addresses_are_the_same_in_each_of_their_spellings_and_never_names() {
        for entry in ["[2001:db8::1]", "2001:db8::1", "[2001:DB8:0:0::1]:443"] {
            assert!(allows(entry, "https://[2001:0db8::1]/"), "{entry}");
        }
        assert!(allows("192.0.2.1", "http://192.0.2.1:80/"));
        assert!(!allows("192.0.2.1", "http://[::ffff:192.0.2.1]/"));
        assert!(!allows("192.0.2.1", "http://192.0.2.1.example/"));
    }

    #[test]
    fn entries_that_mean_nothing_are_refused_with_the_reason() {
        for (entry, reason) in [
            ("", "no domain name"),
            ("https://example.com", "scheme"),
            ("example.com/path", "path"),
            ("user@host", "user"),
            ("host:port", "port"),
            ("host:0", "between"),
            ("host:65536", "between"),
            ("a b", "no domain name"),
            ("a..b", "no domain name"),
            ("*", "wildcard"),
            ("*.", "no domain name"),
            ("a*.example.com", "wildcard"),
            ("a.*.example.com", "wildcard"),
            ("*.*.example.com", "no domain name"),
            ("*.127.0.0.1", "address"),
            ("127.1", "four decimal"),
            ("0x7f000001", "four decimal"),
            ("2130706433", "four decimal"),
            ("[::1", "bracket"),
            ("[::1%eth0]", "IPv6"),
            ("[127.0.0.1]", "IPv6"),
        ] {
            let error = AllowedHost::parse(entry).unwrap_err();
            assert!(error.contains(reason) && error.contains(&format!("{entry:?}")), "{error}");
        }
    }

    #[test]
    fn urls_whose_host_is_ambiguous_go_nowhere() {
        for uri in ["http://127.1/", "http://2130706433/", "http://0x7f.1/", "http://example.com:99999/", "http://a@b/"]
        {
            let uri: http::Uri = uri.parse().unwrap();
            assert!(Target::of(&uri).is_err(), "{uri}");
        }
        assert!(Target::of(&"/path".parse().unwrap()).is_err());
        assert!(Target::of(&"ftp://example.com/".parse().unwrap()).is_err());
    }
}
