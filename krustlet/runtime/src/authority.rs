//! Which host a request is for, and whether it says so as it must: RFC 9112 (3.2, 3.3), RFC 9113 (8.3.1), RFC 3986 (3.2).
//!
//! What two servers in a row read differently is how requests are smuggled past the first. So nothing here is repaired:
//! a request whose host is not plain is refused.

use http::header::{HOST, HeaderValue};
use http::request::Parts;
use http::uri::{self, Authority, Scheme, Uri};
use http::{Method, Version};
use std::net::{Ipv6Addr, SocketAddr};

/// Checks a request's host and target. Afterwards its target or its host line names the host, and they agree.
///
/// `local` stands for the host where HTTP/1.0 may leave it out. The error is for the client.
pub fn check(request: &mut Parts, local: SocketAddr) -> Result<(), &'static str> {
    let mut lines = request.headers.get_all(HOST).iter();
    let host = lines.next();
    if lines.next().is_some() {
        return Err("the request has more than one host line\n");
    }
    let host = match host.map(HeaderValue::to_str) {
        None => None,
        Some(Ok(host)) => Some(host),
        Some(Err(_)) => return Err("the request's host is not valid\n"),
    };
    let old = request.version < Version::HTTP_11;
    // A client that speaks HTTP/1.0 may know of no hosts.
    let host = host.filter(|host| !(old && host.is_empty()));
    if host.is_some_and(|host| !is_valid(host)) {
        return Err("the request's host is not valid\n");
    }
    let http_2 = request.version >= Version::HTTP_2;
    if host.is_none() && !http_2 && !old {
        return Err("the request names no host\n");
    }
    is_target(&request.method, &request.uri, http_2)?;
    if let Some(authority) = request.uri.authority() {
        if !is_valid(authority.as_str()) {
            return Err("the request's target has no valid host\n");
        }
        let Some(host) = host.filter(|host| *host != authority.as_str()) else { return Ok(()) };
        if http_2 && !same(host, authority.as_str(), request.uri.scheme()) {
            return Err("the request's host line and its :authority differ\n");
        }
        // RFC 9112 (3.2.2): the target counts and the host line does not.
        let value =
            HeaderValue::from_str(authority.as_str()).map_err(|_| "the request's target has no valid host\n")?;
        request.headers.insert(HOST, value);
        return Ok(());
    }
    match host {
        Some(_) => Ok(()),
        None if http_2 => Err("the request names no host\n"),
        None => name(&mut request.uri, local),
    }
}

/// The four forms of a target: a path, a whole URI, `*` for OPTIONS; and a host alone for CONNECT.
fn is_target(method: &Method, target: &Uri, http_2: bool) -> Result<(), &'static str> {
    let host_alone = target.authority().is_some() && target.scheme().is_none();
    if host_alone && !http_2 && *method != Method::CONNECT {
        return Err("the request's target is neither a path nor a URI\n");
    }
    if target.scheme().is_some_and(|scheme| *scheme != Scheme::HTTP && *scheme != Scheme::HTTPS) {
        return Err("the request's target is no http URI\n");
    }
    if target.path() == "*" && *method != Method::OPTIONS {
        return Err("the request's target is neither a path nor a URI\n");
    }
    Ok(())
}

fn name(target: &mut Uri, local: SocketAddr) -> Result<(), &'static str> {
    let mut parts = uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = local.to_string().parse::<Authority>().ok();
    parts.path_and_query = target.path_and_query().cloned();
    *target = Uri::from_parts(parts).map_err(|_| "the request names no host\n")?;
    Ok(())
}

/// `uri-host [ ":" port ]`, its host not empty, as the scheme http wants it.
fn is_valid(text: &str) -> bool {
    let (host, port) = split(text);
    let port = port.is_none_or(is_port);
    port && !host.is_empty() && (is_ip_literal(host) || is_registered_name(host))
}

/// The host and what follows its colon.
fn split(text: &str) -> (&str, Option<&str>) {
    let end = if text.starts_with('[') { text.find(']').map_or(text.len(), |end| end + 1) } else { 0 };
    match text.get(end..).and_then(|rest| rest.find(':')) {
        Some(colon) => (&text[..end + colon], Some(&text[end + colon + 1..])),
        None => (text, None),
    }
}

/// Digits, or none at all; and no more than TCP has ports.
fn is_port(text: &str) -> bool {
    let digits = text.trim_start_matches('0');
    text.bytes().all(|byte| byte.is_ascii_digit()) && (digits.is_empty() || digits.parse::<u16>().is_ok())
}

fn is_ip_literal(host: &str) -> bool {
    let Some(address) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) else { return false };
    address.parse::<Ipv6Addr>().is_ok() || is_ip_of_the_future(address)
}

/// `"v" 1*HEXDIG "." 1*( unreserved / sub-delims / ":" )`
fn is_ip_of_the_future(address: &str) -> bool {
    let Some((version, rest)) = address.strip_prefix(['v', 'V']).and_then(|address| address.split_once('.')) else {
        return false;
    };
    let version = !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_hexdigit());
    version && !rest.is_empty() && rest.bytes().all(|byte| is_name_byte(byte) || byte == b':')
}

/// `*( unreserved / pct-encoded / sub-delims )`, IPv4 addresses among them.
fn is_registered_name(host: &str) -> bool {
    let mut bytes = host.bytes();
    while let Some(byte) = bytes.next() {
        let encoded = byte == b'%'
            && bytes.next().is_some_and(|byte| byte.is_ascii_hexdigit())
            && bytes.next().is_some_and(|byte| byte.is_ascii_hexdigit());
        if !encoded && !is_name_byte(byte) {
            return false;
        }
    }
    true
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte)
}

/// Whether two spellings name the same host and port.
fn same(one: &str, other: &str, scheme: Option<&Scheme>) -> bool {
    let default = if scheme == Some(&Scheme::HTTPS) { "443" } else { "80" };
    let port = |port: Option<&str>| {
        let digits = port.filter(|port| !port.is_empty()).unwrap_or(default).to_owned();
        digits.trim_start_matches('0').to_owned()
    };
    let ((one, one_port), (other, other_port)) = (split(one), split(other));
    one.eq_ignore_ascii_case(other) && port(one_port) == port(other_port)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::{Random, cases};
    use http::Request;

    const LOCAL: &str = "127.0.0.9:8080";

    fn checked(version: Version, target: &str, hosts: &[&str]) -> Result<Parts, &'static str> {
        let mut request = Request::get(target).version(version);
        for host in hosts {
            request = request.header(HOST, HeaderValue::from_bytes(host.as_bytes()).unwrap());
        }
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        check(&mut parts, LOCAL.parse().unwrap()).map(|()| parts)
    }

    fn accepts(host: &str) -> bool {
        checked(Version::HTTP_11, "/", &[host]).is_ok()
    }

    #[test]
    fn only_http_1_0_may_leave_the_host_out() {
        let parts = checked(Version::HTTP_10, "/path?query", &[]).unwrap();
        assert_eq!(parts.uri.to_string(), format!("http://{LOCAL}/path?query"));
        assert_eq!(checked(Version::HTTP_10, "/", &[""]).unwrap().uri.authority().unwrap(), LOCAL);
        assert!(checked(Version::HTTP_10, "/", &["h"]).unwrap().uri.authority().is_none());
        for version in [Version::HTTP_11, Version::HTTP_2] {
            assert!(checked(version, "/", &[]).is_err());
            assert!(checked(version, "/", &[""]).is_err());
        }
        // Nor may a URI with a host stand in for the line.
        assert!(checked(Version::HTTP_11, "http://h/", &[]).is_err());
        assert!(checked(Version::HTTP_2, "http://h/", &[]).is_ok());
    }

    #[test]
    fn two_host_lines_are_one_too_many_even_if_they_agree() {
        for version in [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2] {
            assert!(checked(version, "/", &["h", "h"]).is_err());
            assert!(checked(version, "http://h/", &["h", ""]).is_err());
        }
    }

    #[test]
    fn what_is_no_host_is_refused_in_the_line_and_in_the_target() {
        for host in [
            "a b",
            "u@h",
            "u:p@h",
            "h:99999",
            "h:65536",
            "h:-1",
            "h:8 0",
            "h:80:80",
            "h:http",
            ":80",
            ":",
            "h/",
            "h?",
            "h#",
            "[::1",
            "::1",
            "[::1]x",
            "[::1]:x",
            "[1.2.3.4]",
            "[::g]",
            "[fe80::1%eth0]",
            "[v.x]",
            "[vg.x]",
            "[]",
            "%",
            "%4",
            "%zz",
            "a%2",
            "h\\",
            "\"h\"",
            "<h>",
            "h|",
            "h^",
            "h`",
            "{h}",
            "é",
            "h\t",
            "h, ",
        ] {
            assert!(!accepts(host), "{host:?}");
            assert!(checked(Version::HTTP_10, "/", &[host]).is_err(), "{host:?}");
        }
        for target in ["http://u@h/", "http://u:p@h/", "http://h:99999/"] {
            assert!(checked(Version::HTTP_11, target, &["h"]).is_err(), "{target}");
            assert!(checked(Version::HTTP_2, target, &[]).is_err(), "{target}");
        }
    }

    #[test]
    fn every_spelling_that_is_a_host_is_taken() {
        for host in [
            "h",
            "H.Example.",
            "h:",
            "h:0",
            "h:80",
            "h:65535",
            "h:00080",
            "1.2.3.4:1",
            "999.1.1.1",
            "a_b",
            "a~b",
            "a,b",
            "%41%62",
            "[::1]",
            "[::1]:80",
            "[::ffff:1.2.3.4]",
            "[v1f.a:b]:",
            "!$&'()*+,;=-._~",
        ] {
            assert!(accepts(host), "{host:?}");
        }
    }

    /// A host by RFC 3986's grammar.
    fn host(random: &mut Random) -> String {
        const NAME: &[u8] = b"abcxyzABCXYZ0189-._~!$&'()*+,;=";
        let mut name = |length: usize| -> String {
            (0..=random.below(length)).map(|_| char::from(NAME[random.below(NAME.len())])).collect()
        };
        let (one, two) = (name(20), name(3));
        let mut host = match random.below(4) {
            0 => one,
            1 => format!("{one}%{:02X}{two}", random.below(256)),
            2 => format!("[{}]", Ipv6Addr::from(u128::from(random.next()) << random.below(64))),
            _ => format!("[v{:x}.{one}:{two}]", random.below(256)),
        };
        match random.below(3) {
            0 => host.push(':'),
            1 => host.push_str(&format!(":{}", random.below(65536))),
            _ => {}
        }
        host
    }

    #[test]
    fn any_host_of_the_grammar_is_taken_and_none_with_a_byte_outside_of_it() {
        let mut random = Random::new(3);
        let outside: Vec<char> = (32..127).map(char::from).filter(|c| !c.is_ascii_alphanumeric()).collect();
        cases(20_000, || {
            let host = host(&mut random);
            assert!(accepts(&host), "{host:?}");
            let (authority, colon) = (host.clone(), host.ends_with(':') || !host.contains(':'));
            // The http crate's own reader is stricter than the grammar in some names; where both read, they agree.
            if let Ok(read) = authority.parse::<Authority>() {
                assert_eq!(read.host(), split(&host).0);
            }
            let at = random.below(host.len() + 1);
            let stray = outside[random.below(outside.len())];
            if " \"#/<>?@\\^`{|}".contains(stray) {
                let broken = format!("{}{stray}{}", &host[..at], &host[at..]);
                // Spaces around a value are the field's, not the host's.
                assert!(broken.trim() == host || !accepts(&broken), "{broken:?}");
            }
            assert!(!accepts(&format!("{host}:{}{}", if colon { "" } else { ":" }, 65536 + random.below(1 << 40))));
        });
    }

    #[test]
    fn any_bytes_are_taken_or_refused_and_what_is_taken_has_one_reading() {
        let mut random = Random::new(4);
        cases(20_000, || {
            let bytes = random.mutate(b"host.example:8080");
            let Ok(value) = HeaderValue::from_bytes(&bytes) else { return };
            let (mut parts, ()) = Request::get("/").header(HOST, value).body(()).unwrap().into_parts();
            if check(&mut parts, LOCAL.parse().unwrap()).is_ok() {
                let host = parts.headers[HOST].to_str().unwrap();
                assert!(!host.contains(['@', '/', ' ', '?', '#', '\\', '\t']), "{host:?}");
                assert!(!host.is_empty());
            }
        });
    }

    #[test]
    fn the_target_of_a_proxys_request_counts_and_its_host_line_does_not() {
        let parts = checked(Version::HTTP_11, "http://target:81/path", &["line"]).unwrap();
        assert_eq!(parts.headers[HOST], "target:81");
        assert_eq!(parts.uri.path(), "/path");
        assert!(checked(Version::HTTP_11, "ftp://target/", &["target"]).is_err());
    }

    #[test]
    fn in_http_2_the_line_and_the_authority_name_the_same_host() {
        for (authority, host, same) in [
            ("h", "h", true),
            ("h", "H", true),
            ("h", "h:80", true),
            ("h:80", "h", true),
            ("h:080", "h:80", true),
            ("h", "h:", true),
            ("h", "h:81", false),
            ("h", "other", false),
            ("h", "h.", false),
            ("[::1]:80", "[::1]", true),
        ] {
            let checked = checked(Version::HTTP_2, &format!("http://{authority}/"), &[host]);
            assert_eq!(checked.is_ok(), same, "{authority} {host}");
            if let Ok(parts) = checked {
                assert_eq!(parts.headers[HOST].to_str().unwrap(), authority, "the guest is told one spelling");
            }
        }
        assert!(checked(Version::HTTP_2, "https://h/", &["h:443"]).is_ok());
        assert!(checked(Version::HTTP_2, "https://h/", &["h:80"]).is_err());
        assert!(checked(Version::HTTP_2, "/", &["h"]).is_ok(), "a host line alone will do");
    }

    #[test]
    fn a_target_is_a_path_a_uri_or_a_star_for_options() {
        for target in ["h", "h:80", "*"] {
            assert!(checked(Version::HTTP_11, target, &["h"]).is_err(), "{target}");
        }
        let (mut parts, ()) = Request::options("*").header(HOST, "h").body(()).unwrap().into_parts();
        assert!(check(&mut parts, LOCAL.parse().unwrap()).is_ok());
    }
}
