//! Primorials and prime factors over HTTP.
//!
//! `math` and `routes` are plain functions, tested natively. Here is the rest: the few lines that join them to a
//! `wasi:http` host. The component imports `wasi:http/types` and the streams of the bodies, and nothing else.

pub mod math;
mod page;
pub mod routes;

#[cfg(target_arch = "wasm32")]
#[allow(unsafe_code, reason = "the export macro declares an unmangled symbol")]
mod component {
    use wasip2::exports::http::incoming_handler::Guest;
    use wasip2::http::types::{
        ErrorCode, Fields, IncomingRequest, Method, OutgoingBody, OutgoingResponse, ResponseOutparam,
    };

    use crate::routes::{Response, respond};

    /// The most that `blocking-write-and-flush` takes at once, from the text of wasi:io.
    const CHUNK: usize = 4096;

    struct Primorial;

    wasip2::http::proxy::export!(Primorial);

    impl Guest for Primorial {
        fn handle(request: IncomingRequest, out: ResponseOutparam) {
            let method = match request.method() {
                Method::Get => "GET",
                Method::Head => "HEAD",
                _ => "other",
            };
            let target = request.path_with_query().unwrap_or_else(|| "/".into());
            send(out, &respond(method, &target), method != "HEAD");
        }
    }

    /// An error in here means that the client or the host has gone away: there is nobody left to tell.
    fn send(out: ResponseOutparam, response: &Response, with_body: bool) {
        let headers: Vec<_> = response.headers().map(|(name, value)| (name.to_owned(), value.into_bytes())).collect();
        let Ok(headers) = Fields::from_list(&headers) else {
            return ResponseOutparam::set(out, Err(ErrorCode::InternalError(None)));
        };
        let outgoing = OutgoingResponse::new(headers);
        let _ = outgoing.set_status_code(response.status);
        // A body that is never taken lets the host send the length of the one that a GET would have got.
        let body = if with_body { outgoing.body().ok() } else { None };
        ResponseOutparam::set(out, Ok(outgoing));
        let Some(body) = body else { return };
        if let Ok(stream) = body.write() {
            for chunk in response.body.as_bytes().chunks(CHUNK) {
                if stream.blocking_write_and_flush(chunk).is_err() {
                    return;
                }
            }
        }
        let _ = OutgoingBody::finish(body, None);
    }
}
