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
