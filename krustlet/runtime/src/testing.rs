//! What tests share: a deterministic source of mutations, and a signer that writes cosign's format.

use crate::artifact::Digest;
use crate::public_key::PublicKey;
use crate::signature::Signed;
use base64::Engine as _;
use p256::ecdsa::signature::Signer as _;
use p256::ecdsa::{Signature, SigningKey, VerifyingKey};
use std::time::{Duration, Instant};

/// Runs a fuzzed case so many times, or for as many seconds as KRUSTLET_FUZZ_SECONDS says.
pub fn cases(count: usize, mut case: impl FnMut()) {
    let seconds = std::env::var("KRUSTLET_FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let began = Instant::now();
    let mut done = 0;
    while seconds.map_or(done < count, |seconds| began.elapsed() < Duration::from_secs(seconds)) {
        case();
        done += 1;
    }
    println!("{done} cases");
}

/// xorshift64*: the same seed gives the same cases on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 11) as usize % limit.max(1)
    }

    /// The input with one to four bytes flipped, removed, repeated, or a piece of it copied elsewhere.
    pub fn mutate(&mut self, input: &[u8]) -> Vec<u8> {
        let mut output = input.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(output.len());
            match self.below(6) {
                0 => output.truncate(at),
                1 if !output.is_empty() => output[at] ^= 1 << self.below(8),
                2 if !output.is_empty() => output[at] = self.next() as u8,
                3 if !output.is_empty() => {
                    output.remove(at);
                }
                4 => output.insert(at, self.next() as u8),
                _ => {
                    let end = (at + self.below(64)).min(output.len());
                    let piece = output[at..end].to_vec();
                    let to = self.below(output.len());
                    output.splice(to..to, piece);
                }
            }
        }
        output
    }
}

pub struct Signer(SigningKey);

impl Signer {
    pub fn new(seed: u8) -> Self {
        Self(SigningKey::from_slice(&[seed; 32]).unwrap())
    }

    pub fn public_key(&self) -> PublicKey {
        use p256::pkcs8::EncodePublicKey as _;
        let pem = VerifyingKey::from(&self.0).to_public_key_pem(Default::default()).unwrap();
        PublicKey::from_pem(&pem).unwrap()
    }

    pub fn payload(&self, manifest: &Digest) -> Vec<u8> {
        format!(
            r#"{{"critical":{{"identity":{{"docker-reference":"registry/app"}},"image":{{"docker-manifest-digest":"{manifest}"}},"type":"cosign container image signature"}},"optional":null}}"#
        )
        .into_bytes()
    }

    pub fn signature(&self, payload: &[u8]) -> String {
        let signature: Signature = self.0.sign(payload);
        base64::engine::general_purpose::STANDARD.encode(signature.to_der().as_bytes())
    }

    /// A Sigstore bundle around a statement, as cosign 3 makes one with a key.
    pub fn bundle(&self, payload_type: &str, statement: &[u8]) -> serde_json::Value {
        let mut message = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), statement.len()).into_bytes();
        message.extend_from_slice(statement);
        serde_json::json!({
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"publicKey": {"hint": "aGludA=="}},
            "dsseEnvelope": {
                "payload": base64::engine::general_purpose::STANDARD.encode(statement),
                "payloadType": payload_type,
                "signatures": [{"sig": self.signature(&message)}],
            },
        })
    }

    pub fn sign_payload(&self, payload: &[u8]) -> Signed {
        Signed::simple(payload, self.signature(payload))
    }

    pub fn sign(&self, manifest: &Digest) -> Signed {
        self.sign_payload(&self.payload(manifest))
    }
}
