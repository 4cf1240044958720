//! The httpGet of a probe or a hook, as the kubelet puts it together.

use super::ports;
use crate::addresses::PodAddress;
use crate::http_client::{self, Error};
use crate::reach::Reach;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use std::fmt::{Display, Formatter};
use url::Url;

/// An answer is read up to here and no further.
const MAX_BODY: usize = 10 * 1024;

#[derive(Debug, Clone)]
pub struct HttpGet {
    url: Url,
    headers: HeaderMap,
}

impl HttpGet {
    /// Of a container that is reached at `address` unless the action names a host.
    pub fn of(
        get: &HTTPGetAction,
        container: &Container,
        address: PodAddress,
        user_agent: &'static str,
    ) -> Result<Self, String> {
        let host = get.host.clone().filter(|host| !host.is_empty()).unwrap_or_else(|| address.ip.to_string());
        let port = ports::resolve(&get.port, container, address)?;
        Ok(Self { url: url(get, &host, port)?, headers: headers(get, user_agent)? })
    }

    /// The status of the answer. Redirects are followed on the same host; one that leads elsewhere is the answer.
    pub async fn send(&self, reach: &Reach) -> Result<StatusCode, Error> {
        Ok(http_client::get_on_host(&self.url, &self.headers, MAX_BODY, reach).await?.status)
    }

    /// The same without TLS.
    pub fn in_clear(&self) -> Self {
        let mut clear = self.clone();
        // Never refused between these two.
        let _ = clear.url.set_scheme("http");
        clear.headers.remove(header::AUTHORIZATION);
        clear
    }
}

impl Display for HttpGet {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "Get {:?}", self.url.as_str())
    }
}

fn url(get: &HTTPGetAction, host: &str, port: u16) -> Result<Url, String> {
    let scheme = get.scheme.as_deref().filter(|scheme| !scheme.is_empty()).unwrap_or("HTTP").to_ascii_lowercase();
    if scheme != "http" && scheme != "https" {
        return Err(format!("scheme {scheme:?} is neither HTTP nor HTTPS"));
    }
    if !matches!(get.protocol.as_deref(), None | Some("" | "HTTP1")) {
        return Err(format!("protocol {:?} is not supported", get.protocol.as_deref().unwrap_or_default()));
    }
    let path = get.path.as_deref().unwrap_or_default();
    let path = path.split('#').next().unwrap_or_default();
    let slash = if path.starts_with('/') { "" } else { "/" };
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let text = format!("{scheme}://{host}:{port}{slash}{path}");
    Url::parse(&text).map_err(|error| format!("{text:?} is not a URL: {error}"))
}

fn headers(get: &HTTPGetAction, user_agent: &'static str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for given in get.http_headers.iter().flatten() {
        let name: HeaderName = given.name.parse().map_err(|_| format!("{:?} is not a header name", given.name))?;
        let value = HeaderValue::from_str(&given.value).map_err(|_| format!("{name}: the value is not allowed"))?;
        headers.append(name, value);
    }
    headers.entry(header::USER_AGENT).or_insert(HeaderValue::from_static(user_agent));
    match headers.get(header::ACCEPT) {
        None => _ = headers.insert(header::ACCEPT, HeaderValue::from_static("*/*")),
        // As the kubelet reads it, an empty value asks to send none.
        Some(value) if value.is_empty() => _ = headers.remove(header::ACCEPT),
        Some(_) => {}
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const USER_AGENT: &str = "kube-probe/1.37";

    #[test]
    fn urls_are_put_together_as_the_kubelet_does() {
        let url = |get: Value, address: &str| {
            let mut get = get;
            get["port"] = json!(8080);
            let get = serde_json::from_value(get).unwrap();
            let address = PodAddress::of_node(address.parse().unwrap());
            HttpGet::of(&get, &Container::default(), address, USER_AGENT).unwrap().url.to_string()
        };
        assert_eq!(url(json!({}), "10.0.0.1"), "http://10.0.0.1:8080/");
        assert_eq!(
            url(json!({"path": "healthz?full=1#x", "scheme": "HTTPS"}), "::1"),
            "https://[::1]:8080/healthz?full=1"
        );
        assert_eq!(url(json!({"path": "/a b", "host": "example.org"}), "10.0.0.1"), "http://example.org:8080/a%20b");
    }

    #[test]
    fn default_headers_can_be_replaced_and_an_empty_accept_takes_it_away() {
        let headers_of = |given: Value| {
            let get: HTTPGetAction = serde_json::from_value(json!({"port": 1, "httpHeaders": given})).unwrap();
            headers(&get, USER_AGENT)
        };
        let plain = headers_of(json!([])).unwrap();
        assert_eq!((plain["user-agent"].to_str().unwrap(), plain["accept"].to_str().unwrap()), (USER_AGENT, "*/*"));
        let own =
            json!([{"name": "Accept", "value": ""}, {"name": "X-A", "value": "1"}, {"name": "x-a", "value": "2"}]);
        let own = headers_of(own).unwrap();
        assert!(!own.contains_key("accept"));
        assert_eq!(own.get_all("x-a").iter().count(), 2);
        assert!(headers_of(json!([{"name": "a b", "value": ""}])).is_err());
    }
}
