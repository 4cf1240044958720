//! A `wasi:http` component with a route for each thing that a test may want a guest to do; README.md lists them.

use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicU32, Ordering};

use guests::{allocate, args, env, exists, list, print, print_error, read, remove, sleep, spin, touch, trap, write};
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::filesystem::types::ErrorCode as FileError;
use wasip2::http::outgoing_handler;
use wasip2::http::types::{
    ErrorCode, Fields, IncomingBody, IncomingRequest, Method, OutgoingBody, OutgoingRequest, OutgoingResponse,
    ResponseOutparam, Scheme,
};
use wasip2::io::streams::OutputStream;

const SPLICE: u64 = 65_536;

struct Http;

wasip2::http::proxy::export!(Http);

impl Guest for Http {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let target = request.path_with_query().unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let query = Query(query);
        match path {
            "/echo" => echo(request, out),
            "/stream" => stream(out, query.number("chunks"), query.number("ms")),
            "/silent" => {}
            "/error" => ResponseOutparam::set(out, Err(ErrorCode::InternalError(Some("asked to".into())))),
            _ => {
                let (status, body) = answer(path, &query);
                respond(out, status, &[], |stream| stream.write_all(&body).is_ok());
            }
        }
    }
}

fn answer(path: &str, query: &Query) -> (u16, Vec<u8>) {
    let ok = |text: String| (200, text.into_bytes());
    match path {
        "/healthz" => match query.get("file") {
            Some(file) if !exists(&file) => (503, format!("{file} is not there\n").into_bytes()),
            _ => ok("ok\n".into()),
        },
        "/version" => ok(guests::VERSION.into()),
        "/env" => ok(env()),
        "/args" => ok(args()),
        "/count" => {
            // Above 1 only if an instance serves a second request.
            static SERVED: AtomicU32 = AtomicU32::new(0);
            ok((SERVED.fetch_add(1, Ordering::Relaxed) + 1).to_string())
        }
        "/status" => (query.number("code"), Vec::new()),
        "/read" => file(read(&query.text("path"))),
        "/ls" => file(list(&query.text("path")).map(String::into_bytes)),
        "/write" => file(write(&query.text("path"), &query.text("text")).map(|()| Vec::new())),
        "/touch" => file(touch(&query.text("path"), &query.text("way")).map(|()| Vec::new())),
        "/remove" => file(remove(&query.text("path")).map(|()| Vec::new())),
        "/log" => {
            let log = if query.text("stream") == "stderr" { print_error } else { print };
            log(&query.text("text"));
            ok(String::new())
        }
        "/sleep" => {
            sleep(query.number("ms"));
            ok("slept\n".into())
        }
        "/alloc" => {
            let held = allocate(query.number("mib"));
            sleep(query.number("ms"));
            drop(held);
            ok("allocated\n".into())
        }
        "/spin" => spin(),
        "/trap" => trap(),
        "/fetch" => match fetch(&query.text("url")) {
            Ok(answer) => (200, answer),
            Err(reason) => (502, reason.into_bytes()),
        },
        _ => (404, format!("{path} is no route of this guest\n").into_bytes()),
    }
}

/// Method, path and headers come back as `x-request-…` headers, the body as the body, piece by piece as it arrives.
fn echo(request: IncomingRequest, out: ResponseOutparam) {
    let method = match request.method() {
        Method::Other(method) => method,
        method => format!("{method:?}").trim_start_matches("Method::").to_uppercase(),
    };
    let mut headers = vec![
        ("x-request-method".to_owned(), method.into_bytes()),
        ("x-request-path".to_owned(), request.path_with_query().unwrap_or_default().into_bytes()),
        ("x-request-authority".to_owned(), request.authority().unwrap_or_default().into_bytes()),
    ];
    for (name, value) in request.headers().entries() {
        headers.push((format!("x-request-header-{name}"), value));
    }
    let Ok(body) = request.consume() else { return };
    respond(out, 200, &headers, |output| {
        let Ok(input) = body.stream() else { return false };
        while output.blocking_splice(&input, SPLICE).is_ok() {}
        true
    });
}

/// A body that takes its time: so many lines, so many milliseconds after one another.
fn stream(out: ResponseOutparam, chunks: u32, milliseconds: u64) {
    respond(out, 200, &[], |output| {
        (0..chunks).all(|chunk| {
            sleep(milliseconds);
            output.write_all(format!("{chunk}\n").as_bytes()).and_then(|()| output.flush()).is_ok()
        })
    });
}

/// Sends status and headers, then what `write` writes. A body that `write` gives up on ends as a broken one.
fn respond(
    out: ResponseOutparam,
    status: u16,
    headers: &[(String, Vec<u8>)],
    write: impl FnOnce(&mut OutputStream) -> bool,
) {
    let Ok(fields) = Fields::from_list(headers) else {
        return ResponseOutparam::set(out, Err(ErrorCode::InternalError(Some("headers".into()))));
    };
    let response = OutgoingResponse::new(fields);
    let _ = response.set_status_code(status);
    let body = response.body();
    ResponseOutparam::set(out, Ok(response));
    let Ok(body) = body else { return };
    let complete = body.write().is_ok_and(|mut stream| write(&mut stream));
    if complete {
        let _ = OutgoingBody::finish(body, None);
    }
}

/// GETs a URL: the status on the first line, then the body; or the name of wasi:http's error code.
fn fetch(url: &str) -> Result<Vec<u8>, String> {
    let (scheme, rest) = url.split_once("://").ok_or("url= needs a scheme")?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let scheme = if scheme == "https" { Scheme::Https } else { Scheme::Http };
    let request = OutgoingRequest::new(Fields::new());
    request
        .set_scheme(Some(&scheme))
        .and_then(|()| request.set_authority(Some(authority)))
        .and_then(|()| request.set_path_with_query(Some(if path.is_empty() { "/" } else { path })))
        .map_err(|()| "url= is not valid")?;
    let reason = |code: ErrorCode| format!("{code:?}").trim_start_matches("ErrorCode::").to_owned();
    let pending = outgoing_handler::handle(request, None).map_err(reason)?;
    pending.subscribe().block();
    let response = pending.get().ok_or("no answer")?.map_err(|()| "answered twice")?.map_err(reason)?;
    let mut answer = format!("{}\n", response.status()).into_bytes();
    let body: IncomingBody = response.consume().map_err(|()| "the body is gone")?;
    let mut stream = body.stream().map_err(|()| "the body is gone")?;
    stream.read_to_end(&mut answer).map_err(|error| error.to_string())?;
    Ok(answer)
}

/// The outcome of something on a file; an error is WASI's own word for it.
fn file(result: Result<Vec<u8>, FileError>) -> (u16, Vec<u8>) {
    match result {
        Ok(content) => (200, content),
        Err(FileError::NoEntry) => (404, b"no-entry".to_vec()),
        Err(error) => (403, error.name().as_bytes().to_vec()),
    }
}

struct Query<'a>(&'a str);

impl Query<'_> {
    fn get(&self, wanted: &str) -> Option<String> {
        let mut pairs = self.0.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(name, _)| *name == wanted).map(|(_, value)| decode(value))
    }

    fn text(&self, name: &str) -> String {
        self.get(name).unwrap_or_default()
    }

    fn number<T: std::str::FromStr + Default>(&self, name: &str) -> T {
        self.text(name).parse().unwrap_or_default()
    }
}

/// Undoes form encoding.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        let hexadecimal = after.get(..2).and_then(|pair| str::from_utf8(pair).ok());
        match (first, hexadecimal.and_then(|pair| u8::from_str_radix(pair, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            (b'+', _) => bytes.push(b' '),
            _ => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
