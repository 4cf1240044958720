//! From a request to a response: which path means what, what is refused and how. No I/O here.

use std::num::NonZeroU64;

use crate::math::{factorize, primes_up_to, product};
use crate::page;

/// The largest n of n#: 4,298 digits and 1,229 primes, about 11 KB of JSON.
pub const MAX_PRIMORIAL: u64 = 10_000;

/// Bytes in a path with its query. The longest sensible one is a tenth of that.
const MAX_TARGET: usize = 256;

/// Numbers up to here survive a client that reads JSON numbers as doubles (RFC 8259, section 6). Larger ones are
/// JSON strings, as RFC 7493, section 2.2, recommends.
const MAX_EXACT: u64 = (1 << 53) - 1;

const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";

/// An answer never changes; an hour is for the day when its form does.
const CACHE: &str = "public, max-age=3600";
const NO_CACHE: &str = "no-store";

/// What goes back to the client. For HEAD the body is not sent, its length is.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub body: String,
    content_type: &'static str,
    cache_control: &'static str,
}

impl Response {
    /// Names in lower case, as wasi:http wants them.
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, String)> {
        [
            ("content-type", self.content_type.to_owned()),
            ("content-length", self.body.len().to_string()),
            ("cache-control", self.cache_control.to_owned()),
            ("x-content-type-options", "nosniff".to_owned()),
        ]
        .into_iter()
        .chain((self.status == 405).then(|| ("allow", "GET, HEAD".to_owned())))
        .chain(
            (self.content_type == HTML).then(|| ("content-security-policy", page::CONTENT_SECURITY_POLICY.to_owned())),
        )
    }

    fn json(body: String) -> Self {
        Self { status: 200, body, content_type: JSON, cache_control: CACHE }
    }

    /// `message` is one of ours and needs no escaping: it never repeats what the client sent.
    fn error(status: u16, message: &str) -> Self {
        let body = format!(r#"{{"error":{{"code":{status},"message":"{message}"}}}}"#);
        Self { status, body, content_type: JSON, cache_control: NO_CACHE }
    }
}

/// Answers `method` on `target`, a path with or without a query.
pub fn respond(method: &str, target: &str) -> Response {
    if target.len() > MAX_TARGET {
        return Response::error(414, &format!("the path is longer than {MAX_TARGET} bytes"));
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let Some(route) = Route::of(path, query) else {
        return Response::error(404, "no such path: try /, /primorial/30, /factor/360 or /healthz");
    };
    if method != "GET" && method != "HEAD" {
        return Response::error(405, "only GET and HEAD are allowed here");
    }
    match route {
        Route::Page(query) => people(query),
        Route::Health => Response { cache_control: NO_CACHE, ..Response::json(r#"{"status":"ok"}"#.into()) },
        Route::Primorial(n) => primorial(n),
        Route::Factor(n) => factor(n),
    }
}

enum Route<'a> {
    Page(&'a str),
    Health,
    Primorial(&'a str),
    Factor(&'a str),
}

impl<'a> Route<'a> {
    fn of(path: &'a str, query: &'a str) -> Option<Self> {
        match path.split('/').skip(1).collect::<Vec<_>>()[..] {
            [""] => Some(Self::Page(query)),
            ["healthz"] => Some(Self::Health),
            ["primorial", n] => Some(Self::Primorial(n)),
            ["factor", n] => Some(Self::Factor(n)),
            _ => None,
        }
    }
}

fn primorial(text: &str) -> Response {
    match number(text, MAX_PRIMORIAL) {
        Ok(n) => {
            let (primes, decimal) = primorial_of(n);
            Response::json(format!(
                r#"{{"n":{n},"primorial":"{decimal}","digits":{},"primes":[{}]}}"#,
                decimal.len(),
                list(&primes, u32::to_string),
            ))
        }
        Err(message) => Response::error(400, &message),
    }
}

fn factor(text: &str) -> Response {
    match positive(text) {
        Ok(n) => {
            let factors = list(&factorize(n), |factor| {
                format!(r#"{{"prime":{},"exponent":{}}}"#, integer(factor.prime), factor.exponent)
            });
            Response::json(format!(r#"{{"n":{},"factors":[{factors}]}}"#, integer(n.get())))
        }
        Err(message) => Response::error(400, &message),
    }
}

/// The page, with the answer to the form that was sent, if one was.
fn people(query: &str) -> Response {
    let answer = query.split('&').filter_map(|field| field.split_once('=')).find_map(|(name, value)| {
        // A form sends a space as a plus: blanks around a number are no mistake.
        let value = value.trim_matches('+');
        match name {
            "primorial" => Some(number(value, MAX_PRIMORIAL).map(|n| {
                let (primes, decimal) = primorial_of(n);
                page::primorial(n, &decimal, &primes)
            })),
            "factor" => Some(positive(value).map(|n| page::factors(n.get(), &factorize(n)))),
            _ => None,
        }
    });
    let (status, cache_control, answer) = match answer {
        None => (200, CACHE, String::new()),
        Some(Ok(answer)) => (200, CACHE, answer),
        Some(Err(message)) => (400, NO_CACHE, page::error(&message)),
    };
    Response { status, body: page::page(&answer), content_type: HTML, cache_control }
}

/// The primes up to `n` and their product; `n` is at most `MAX_PRIMORIAL`.
fn primorial_of(n: u64) -> (Vec<u32>, String) {
    let primes = primes_up_to(n as u32);
    let decimal = product(&primes);
    (primes, decimal)
}

/// A number in ASCII digits and nothing else, up to `max`, or what is wrong with it.
fn number(text: &str, max: u64) -> Result<u64, String> {
    if text.is_empty() {
        return Err(format!("a number is missing here, from 0 to {max}"));
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("not a number: only the digits 0 to 9 are allowed".into());
    }
    // What does not parse now is digits that overflow.
    text.parse().ok().filter(|&n| n <= max).ok_or_else(|| format!("too large: at most {max} is allowed"))
}

fn positive(text: &str) -> Result<NonZeroU64, String> {
    NonZeroU64::new(number(text, u64::MAX)?).ok_or_else(|| "0 has no prime factors: at least 1 is needed".into())
}

/// An integer in JSON that no client rounds.
fn integer(n: u64) -> String {
    if n <= MAX_EXACT { n.to_string() } else { format!("\"{n}\"") }
}

fn list<T>(items: &[T], json: impl Fn(&T) -> String) -> String {
    items.iter().map(json).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn get(target: &str) -> (u16, Value) {
        let response = respond("GET", target);
        (response.status, serde_json::from_str(&response.body).unwrap_or(Value::Null))
    }

    fn header(response: &Response, wanted: &str) -> Option<String> {
        response.headers().find(|(name, _)| *name == wanted).map(|(_, value)| value)
    }

    #[test]
    fn a_primorial_comes_with_its_digits_and_primes() {
        assert_eq!(
            get("/primorial/30"),
            (
                200,
                json!({"n": 30, "primorial": "6469693230", "digits": 10, "primes": [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]})
            )
        );
        assert_eq!(get("/primorial/0"), (200, json!({"n": 0, "primorial": "1", "digits": 1, "primes": []})));
        assert_eq!(get("/primorial/0030").1["n"], 30);
        assert_eq!(get("/primorial/10000").1["digits"], 4298);
    }

    #[test]
    fn a_factorization_comes_with_exponents() {
        let factors = json!([{"prime": 2, "exponent": 3}, {"prime": 3, "exponent": 2}, {"prime": 5, "exponent": 1}]);
        assert_eq!(get("/factor/360"), (200, json!({"n": 360, "factors": factors})));
        assert_eq!(get("/factor/1"), (200, json!({"n": 1, "factors": []})));
        assert_eq!(get("/factor/18446744073709551615").1["factors"][6], json!({"prime": 6700417, "exponent": 1}));
    }

    #[test]
    fn integers_that_a_double_would_round_are_strings() {
        assert_eq!(get("/factor/9007199254740991").1["n"], json!(9007199254740991u64));
        assert_eq!(get("/factor/9007199254740992").1["n"], json!("9007199254740992"));
        let (_, prime) = get("/factor/18446744073709551557");
        assert_eq!(prime["factors"], json!([{"prime": "18446744073709551557", "exponent": 1}]));
    }

    #[test]
    fn what_is_no_number_in_range_is_a_400_with_a_json_error() {
        let bad = [
            "",
            "-1",
            "+1",
            "1.5",
            "1e3",
            "0x10",
            "abc",
            "%31",
            "\u{663}",
            "%D9%A3",
            " 1",
            "1 ",
            "1,000",
            "10001",
            "18446744073709551616",
            "99999999999999999999999999999999999999",
        ];
        for text in bad {
            let (status, body) = get(&format!("/primorial/{text}"));
            assert_eq!((status, &body["error"]["code"]), (400, &json!(400)), "{text}");
            assert!(body["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{text}");
        }
        for text in ["", "0", "000", "-5", "+5", "5.0", "x", "18446744073709551616"] {
            assert_eq!(get(&format!("/factor/{text}")).0, 400, "{text}");
        }
    }

    #[test]
    fn unknown_paths_are_a_404() {
        for path in
            ["/nothing", "/primorial", "/primorial/3/", "/primorial/3/4", "//", "/healthz/x", "", "*", "/Factor/3"]
        {
            let (status, body) = get(path);
            assert_eq!((status, &body["error"]["code"]), (404, &json!(404)), "{path}");
        }
    }

    #[test]
    fn a_path_without_end_is_a_414() {
        assert_eq!(get(&format!("/primorial/{}", "0".repeat(200))).0, 200);
        assert_eq!(get(&format!("/primorial/{}", "1".repeat(9000))).0, 414);
        assert_eq!(get(&format!("/?{}", "a".repeat(9000))).0, 414);
    }

    #[test]
    fn other_methods_are_a_405_that_says_what_is_allowed() {
        for path in ["/", "/healthz", "/primorial/30", "/factor/abc"] {
            let response = respond("POST", path);
            assert_eq!(response.status, 405, "{path}");
            assert_eq!(header(&response, "allow").as_deref(), Some("GET, HEAD"));
        }
        assert_eq!(respond("POST", "/nothing").status, 404);
        assert_eq!(header(&respond("GET", "/"), "allow"), None);
    }

    #[test]
    fn head_has_the_headers_of_get() {
        for path in ["/", "/primorial/30", "/nothing"] {
            let (get, head) = (respond("GET", path), respond("HEAD", path));
            assert_eq!(head.status, get.status);
            assert!(head.headers().eq(get.headers()), "{path}");
        }
    }

    #[test]
    fn answers_may_be_kept_and_errors_may_not() {
        let cached = |target| header(&respond("GET", target), "cache-control").unwrap_or_default();
        assert_eq!(cached("/primorial/30"), CACHE);
        assert_eq!(cached("/"), CACHE);
        for target in ["/healthz", "/primorial/x", "/nothing", "/?factor=x"] {
            assert_eq!(cached(target), NO_CACHE, "{target}");
        }
    }

    #[test]
    fn a_query_on_an_answer_changes_nothing() {
        assert_eq!(get("/primorial/30?x=1"), get("/primorial/30"));
        assert_eq!(get("/healthz?"), (200, json!({"status": "ok"})));
    }

    #[test]
    fn the_page_answers_its_own_forms() {
        let page = |target: &str| {
            let response = respond("GET", target);
            assert_eq!(header(&response, "content-type").as_deref(), Some(HTML));
            assert!(header(&response, "content-security-policy").is_some());
            (response.status, response.body)
        };
        assert_eq!(page("/").0, 200);
        assert!(page("/?primorial=30").1.contains("30# = 6469693230"));
        assert!(page("/?factor=+360+").1.contains("2<sup>3</sup> × 3<sup>2</sup> × 5"));
        assert!(page("/?factor=1").1.contains("no prime factors"));
        let (status, body) = page("/?factor=%3Cscript%3E");
        assert_eq!(status, 400);
        assert!(body.contains("role=\"alert\"") && !body.contains("script"));
        assert_eq!(page("/?primorial=10001").0, 400);
        assert_eq!(page("/?other=1&primorial=3").0, 200);
    }
}
