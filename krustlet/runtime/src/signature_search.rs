//! Where an image's signatures and provenance are looked for, and why none of those found counts.
//!
//! First the tags of cosign 2, then the referrers: by the registry's API, else by the tag that clients keep where there is none.
//! The first good one counts, whatever stands beside it; everything that is asked for has a bound.

use crate::artifact::{Descriptor, Digest};
use crate::bundle::{self, Listed};
use crate::provenance::{self, Builder};
use crate::public_key::PublicKey;
use crate::registry::{FetchError, Session};
use crate::signature::{self, Signed};
use bytes::Bytes;

/// What fits in a pod's status.
const MAX_REASONS: usize = 4;

/// Why an image has no signature that counts.
pub enum NotSigned {
    /// There may be one that could not be had.
    Unknown(FetchError),
    Refused(String),
}

impl From<FetchError> for NotSigned {
    fn from(error: FetchError) -> Self {
        Self::Unknown(error)
    }
}

/// What is looked for.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    Signature,
    /// That one of these built it.
    Provenance(&'a [Builder]),
}

pub async fn find(
    session: &mut Session<'_>,
    manifest: &Digest,
    keys: &[PublicKey],
    wanted: Wanted<'_>,
) -> Result<Signed, NotSigned> {
    let mut search =
        Search { session, manifest, keys, wanted, is_signed: false, reasons: Vec::new(), more: 0, unknown: None };
    let at_tag = match wanted {
        Wanted::Signature => search.signature_tag().await?,
        Wanted::Provenance(_) => search.attestation_tag().await?,
    };
    if let Some(signed) = at_tag {
        return Ok(signed);
    }
    if let Some(signed) = search.referrers().await? {
        return Ok(signed);
    }
    Err(search.refusal())
}

struct Search<'a, 'b> {
    session: &'a mut Session<'b>,
    manifest: &'a Digest,
    keys: &'a [PublicKey],
    wanted: Wanted<'a>,
    /// Whether there is anything that is meant as what is looked for.
    is_signed: bool,
    reasons: Vec<String>,
    more: usize,
    unknown: Option<FetchError>,
}

impl Search<'_, '_> {
    async fn tag(&mut self, tag: &str) -> Result<Option<Bytes>, FetchError> {
        match self.session.manifest(tag, signature::MAX_SIGNATURE_MANIFEST).await {
            Ok((document, _)) => Ok(Some(document)),
            Err(FetchError::NotFound(_)) => Ok(None),
            Err(error) => self.refuse_unread(&format!("tag {tag}"), error).map(|()| None),
        }
    }

    /// cosign 2's attestations: a tag that is made of the digest, and an envelope a layer.
    async fn attestation_tag(&mut self) -> Result<Option<Signed>, FetchError> {
        let tag = provenance::tag(self.manifest);
        let Some(document) = self.tag(&tag).await? else { return Ok(None) };
        let layers = match provenance::layers(&document) {
            Ok(layers) => layers,
            Err(cause) => {
                self.refuse(format!("its tag {tag} {cause}"));
                return Ok(None);
            }
        };
        for layer in layers {
            let Some(envelope) = self.text("attestation", &layer).await else { continue };
            let signed = Signed::Envelope { envelope };
            if self.counts(&format!("attestation {} at tag {tag}", layer.digest), &signed) {
                return Ok(Some(signed));
            }
        }
        Ok(None)
    }

    /// cosign 2's signatures: a tag that is made of the digest.
    async fn signature_tag(&mut self) -> Result<Option<Signed>, FetchError> {
        let tag = signature::tag(self.manifest);
        let Some(document) = self.tag(&tag).await? else { return Ok(None) };
        self.is_signed = true;
        let layers = match signature::layers(&document) {
            Ok(layers) => layers,
            Err(cause) => {
                self.refuse(format!("its tag {tag} {cause}"));
                return Ok(None);
            }
        };
        for cause in layers.malformed {
            self.refuse(format!("its signature at tag {tag} {cause}"));
        }
        for layer in layers.signatures {
            if let Some(payload) = self.blob("signature payload", &layer.payload).await {
                let signed = Signed::simple(&payload, layer.signature);
                if self.counts(&format!("signature at tag {tag}"), &signed) {
                    return Ok(Some(signed));
                }
            }
        }
        Ok(None)
    }

    /// cosign 3's: a manifest of its own, which names the signed one as its subject.
    async fn referrers(&mut self) -> Result<Option<Signed>, FetchError> {
        let mut listed = self.listed().await?;
        // What is listed as something else may be a bundle, and comes after those that are listed as one.
        listed.sort_by_key(|entry| !entry.is_bundle);
        let mut seen = std::collections::BTreeSet::new();
        listed.retain(|entry| seen.insert(entry.digest.clone()));
        let count = listed.len();
        for entry in listed.into_iter().take(bundle::MAX_REFERRERS) {
            if let Some(signed) = self.referrer(&entry.digest).await {
                return Ok(Some(signed));
            }
        }
        if count > bundle::MAX_REFERRERS {
            let first = bundle::MAX_REFERRERS;
            self.reasons.insert(0, format!("of its {count} referrers the first {first} were looked at"));
        }
        Ok(None)
    }

    async fn listed(&mut self) -> Result<Vec<Listed>, FetchError> {
        let mut listed = Vec::new();
        let mut next = None;
        for number in 0..bundle::MAX_PAGES {
            let page = match self.session.referrers(self.manifest, next.take(), bundle::MAX_INDEX).await {
                Ok(Some(page)) => page,
                Ok(None) => return self.listed_at_tag().await,
                Err(error) if number > 0 => {
                    self.unknown.get_or_insert(error);
                    break;
                }
                Err(error) => return self.refuse_unread("list of referrers", error).map(|()| listed),
            };
            self.read_index(&page.index, "list of referrers", &mut listed);
            next = page.next;
            if next.is_none() || listed.len() > bundle::MAX_REFERRERS {
                break;
            }
        }
        Ok(listed)
    }

    /// Where the registry has no referrers API: the index that clients keep at a tag.
    async fn listed_at_tag(&mut self) -> Result<Vec<Listed>, FetchError> {
        let tag = format!("sha256-{}", self.manifest.hex());
        let mut listed = Vec::new();
        match self.session.index(&tag, bundle::MAX_INDEX).await {
            Ok(index) => self.read_index(&index, &format!("list of referrers at tag {tag}"), &mut listed),
            Err(FetchError::NotFound(_)) => {}
            Err(error) => self.refuse_unread(&format!("list of referrers at tag {tag}"), error)?,
        }
        Ok(listed)
    }

    fn read_index(&mut self, index: &[u8], what: &str, listed: &mut Vec<Listed>) {
        match bundle::listed(index) {
            Ok(found) => listed.extend(found),
            Err(cause) => self.refuse(format!("its {what} is no OCI index: {cause}")),
        }
    }

    async fn referrer(&mut self, digest: &Digest) -> Option<Signed> {
        let what = format!("referrer {digest}");
        let document = match self.session.manifest(digest.as_str(), bundle::MAX_REFERRER).await {
            Ok((document, _)) => document,
            Err(error) => {
                self.refuse_or_remember(&what, error);
                return None;
            }
        };
        let layer = match bundle::layer(&document, self.manifest) {
            Ok(layer) => layer,
            Err(cause) => {
                self.refuse(format!("its {what} {cause}"));
                return None;
            }
        };
        self.is_signed |= matches!(self.wanted, Wanted::Signature);
        let signed = Signed::Bundle { bundle: self.text("bundle", &layer).await? };
        self.counts(&format!("bundle {}", layer.digest), &signed).then_some(signed)
    }

    /// Whether this is what is looked for, and good; what is something else is passed over.
    fn counts(&mut self, what: &str, signed: &Signed) -> bool {
        let checked = match self.wanted {
            Wanted::Signature => signed.check(self.manifest, self.keys).map(|()| true),
            Wanted::Provenance(builders) => provenance::check(signed, self.manifest, self.keys, builders),
        };
        checked.unwrap_or_else(|cause| {
            self.is_signed = true;
            self.refuse(format!("its {what} {cause}"));
            false
        })
    }

    async fn text(&mut self, what: &str, layer: &Descriptor) -> Option<String> {
        String::from_utf8(self.blob(what, layer).await?)
            .inspect_err(|_| self.refuse(format!("its {what} {} is malformed: no UTF-8", layer.digest)))
            .ok()
    }

    async fn blob(&mut self, what: &str, blob: &Descriptor) -> Option<Vec<u8>> {
        match self.session.whole_blob(&blob.digest, blob.size).await {
            Ok(content) => Some(content),
            Err(error) => {
                self.refuse_or_remember(&format!("{what} {}", blob.digest), error);
                None
            }
        }
    }

    fn refuse(&mut self, reason: String) {
        if self.reasons.contains(&reason) {
            return;
        }
        match self.reasons.len() < MAX_REASONS {
            true => self.reasons.push(reason),
            false => self.more += 1,
        }
    }

    /// A place to look that cannot be read: without an answer, or without the right to one, nothing can be said.
    fn refuse_unread(&mut self, what: &str, error: FetchError) -> Result<(), FetchError> {
        match error {
            FetchError::Unavailable(_) | FetchError::Denied(_) => Err(error),
            error => {
                self.refuse(format!("its {what} cannot be read: {error}"));
                Ok(())
            }
        }
    }

    /// One among others that cannot be read: a good one may stand beside it.
    fn refuse_or_remember(&mut self, what: &str, error: FetchError) {
        if let Err(error) = self.refuse_unread(what, error) {
            self.unknown.get_or_insert(error);
        }
    }

    fn refusal(self) -> NotSigned {
        if let Some(error) = self.unknown {
            return NotSigned::Unknown(error);
        }
        let (absent, tag) = match self.wanted {
            Wanted::Signature => ("it is not signed: ", signature::tag(self.manifest)),
            Wanted::Provenance(_) => ("nothing says who built it: ", provenance::tag(self.manifest)),
        };
        if self.reasons.is_empty() {
            let kind = if matches!(self.wanted, Wanted::Signature) { "" } else { " with SLSA provenance" };
            return NotSigned::Refused(format!(
                "{absent}manifest {} has no tag {tag} and no Sigstore bundle{kind} among its referrers",
                self.manifest,
            ));
        }
        let more = if self.more > 0 { format!("; and {} more", self.more) } else { String::new() };
        let what = if self.is_signed { "" } else { absent };
        NotSigned::Refused(format!("{what}{}{more}", self.reasons.join("; ")))
    }
}
