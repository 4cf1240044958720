//! The page for people: two forms and the answer to one of them. It works without scripts and loads nothing.

use crate::math::Factor;
use crate::routes::MAX_PRIMORIAL;

const PAGE: &str = include_str!("page.html");

/// Nothing but the page's own style, named by its hash, and forms that come back here.
pub const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; \
    style-src 'sha256-kDjQpiwgtNBF/CLizBDt9w2x7YViYzlVobeDfwneaZg='; \
    form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// The page around `answer`, which is HTML.
pub fn page(answer: &str) -> String {
    PAGE.replace("{answer}", answer)
        .replace("{primorial-max}", &MAX_PRIMORIAL.to_string())
        .replace("{factor-max}", &u64::MAX.to_string())
}

/// n# as an answer on the page.
pub fn primorial(n: u64, decimal: &str, primes: &[u32]) -> String {
    let (digits, count) = (decimal.len(), primes.len());
    format!(
        "<section aria-label=\"Answer\"><p>{n}# = {decimal}</p>\n\
         <p>{digits} digits, {count} primes. <a href=\"/primorial/{n}\">As JSON</a></p></section>"
    )
}

/// A factorization as an answer on the page.
pub fn factors(n: u64, factors: &[Factor]) -> String {
    let terms: Vec<_> = factors
        .iter()
        .map(|factor| match factor.exponent {
            1 => factor.prime.to_string(),
            exponent => format!("{}<sup>{exponent}</sup>", factor.prime),
        })
        .collect();
    let product = if terms.is_empty() { "1, which has no prime factors".into() } else { terms.join(" × ") };
    format!(
        "<section aria-label=\"Answer\"><p>{n} = {product}</p>\n\
         <p><a href=\"/factor/{n}\">As JSON</a></p></section>"
    )
}

/// What was wrong with the number; `message` is plain text of our own.
pub fn error(message: &str) -> String {
    format!("<section role=\"alert\"><p>{message}</p></section>")
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use sha2::{Digest as _, Sha256};

    use super::*;

    #[test]
    fn the_policy_names_the_hash_of_the_style() {
        let style = PAGE.split_once("<style>").and_then(|(_, rest)| rest.split_once("</style>"));
        let hash = STANDARD.encode(Sha256::digest(style.map_or("", |(style, _)| style)));
        assert!(CONTENT_SECURITY_POLICY.contains(&format!("'sha256-{hash}'")), "the hash is now {hash}");
    }

    #[test]
    fn the_page_loads_nothing() {
        for element in ["<script", "<link", "<img", "http:", "https:", "url("] {
            assert!(!PAGE.contains(element), "{element}");
        }
    }

    #[test]
    fn every_input_has_a_label() {
        assert_eq!(PAGE.matches("<input").count(), PAGE.matches("<label").count());
        for name in ["primorial", "factor"] {
            assert!(PAGE.contains(&format!("<label for=\"{name}\">")));
            assert!(PAGE.contains(&format!("<input id=\"{name}\" name=\"{name}\"")));
        }
    }
}
