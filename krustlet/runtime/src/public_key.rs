//! The keys that the node trusts, and signatures by them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use p256::ecdsa::signature::Verifier as _;
use p256::ecdsa::{Signature, VerifyingKey};

/// A DER signature of P-256 has at most 72 bytes; base64 makes that 96.
pub const MAX_ENCODED: usize = 256;

/// An ECDSA P-256 public key that may sign modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// Reads a PEM `PUBLIC KEY` (SPKI) as `cosign generate-key-pair` and `openssl` write it.
    pub fn from_pem(pem: &str) -> Result<Self, String> {
        use p256::pkcs8::DecodePublicKey as _;
        VerifyingKey::from_public_key_pem(pem.trim())
            .map(Self)
            .map_err(|error| format!("not a PEM public key for ECDSA P-256: {error}"))
    }

    /// Its SubjectPublicKeyInfo in DER.
    pub fn spki(&self) -> Vec<u8> {
        use p256::pkcs8::EncodePublicKey as _;
        // It was made of one, so that it can be written as one.
        self.0.to_public_key_der().map(|der| der.as_bytes().to_vec()).unwrap_or_default()
    }
}

pub fn is_signed_by(keys: &[PublicKey], message: &[u8], signature: &Signature) -> bool {
    keys.iter().any(|key| key.0.verify(message, signature).is_ok())
}

pub fn der(signature: &str) -> Result<Signature, String> {
    if signature.len() > MAX_ENCODED {
        return Err(format!("{} characters of base64 are no ECDSA signature", signature.len()));
    }
    let der = BASE64.decode(signature.trim()).map_err(|error| format!("no base64: {error}"))?;
    Signature::from_der(&der).map_err(|_| "no DER ECDSA P-256 signature".to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Verification;

    const KEY: &str = "-----BEGIN PUBLIC KEY-----\n\
        MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEOTfGE1RYa2UAuX4uK2ONFFeYuaIR\n\
        7OsF4N8yLj35bSgqFAa2JmWr8u5Zr907zfx6yrRFVSGucyUloz3ZVmmO2g==\n\
        -----END PUBLIC KEY-----";

    #[test]
    fn keys_are_named_as_whoever_has_them_can_name_them_in_whatever_order() {
        // openssl ec -pubin -outform DER | sha256sum
        let key = PublicKey::from_pem(KEY).unwrap();
        assert_eq!(Verification::Keys(vec![key.clone()]).fingerprint().unwrap(), "3a681522bfed75cd4c6044da7c28e1e4");
        let other = crate::testing::Signer::new(2).public_key();
        let both = [vec![key.clone(), other.clone()], vec![other, key.clone(), key.clone()]];
        let [one, two] = both.map(|keys| Verification::Keys(keys).fingerprint());
        assert_eq!(one, two);
        assert_ne!(one, Verification::Keys(vec![key]).fingerprint());
        assert_eq!(Verification::AllowUnsigned.fingerprint(), None);
    }
}
