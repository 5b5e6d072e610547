//! The key of a cluster: one file that everyone who belongs to it has, and nobody else.
//!
//! [`ClusterKey::new`] makes one; [`ClusterKey::from_pem`] reads it back. It holds an authority's
//! certificate, and one certificate of that authority with its private key, which all devices
//! share: with it both ends of every connection prove that they belong to the cluster (mutual TLS).
//! The authority's own private key is thrown away, so that nobody can add others later: a new key is
//! a new cluster. Keys are never logged: they print as their fingerprint.

use std::fmt;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

/// Largest key file accepted, in bytes: two certificates and a key take two thousand.
pub const MAX_KEY_BYTES: usize = 64 << 10;
/// Clocks of devices without a battery may be behind by this much when they first connect.
const CLOCKS_BEHIND: Duration = Duration::from_secs(2 * 24 * 3600);

const CERTIFICATE: &str = "CERTIFICATE";
const PRIVATE_KEY: &str = "PRIVATE KEY";

/// What the members of a cluster have in common.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey {
    authority: String,
    certificate: String,
    private_key: String,
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey({})", self.fingerprint())
    }
}

impl ClusterKey {
    /// A new key, good for `lifetime` from now on.
    ///
    /// # Errors
    /// [`KeyError::Make`] when the system has no random numbers, or the lifetime no end in the calendar.
    pub fn new(lifetime: Duration) -> Result<ClusterKey, KeyError> {
        let now = OffsetDateTime::now_utc();
        let end = now.checked_add(lifetime.try_into().map_err(|_| KeyError::Lifetime)?);
        let (start, end) = (now - CLOCKS_BEHIND, end.ok_or(KeyError::Lifetime)?);
        let make = |error: rcgen::Error| KeyError::Make { reason: error.to_string() };

        let mut authority = CertificateParams::new(Vec::new()).map_err(make)?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        authority.distinguished_name.push(DnType::CommonName, "snn cluster authority");
        (authority.not_before, authority.not_after) = (start, end);
        let authority_key = KeyPair::generate().map_err(make)?;
        let authority_certificate = authority.self_signed(&authority_key).map_err(make)?;

        let mut member = CertificateParams::new(vec!["snn".to_owned()]).map_err(make)?;
        member.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        member.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        member.distinguished_name.push(DnType::CommonName, "snn cluster member");
        (member.not_before, member.not_after) = (start, end);
        let member_key = KeyPair::generate().map_err(make)?;
        let issuer = Issuer::new(authority, authority_key);
        let certificate = member.signed_by(&member_key, &issuer).map_err(make)?;
        Ok(ClusterKey {
            authority: authority_certificate.pem(),
            certificate: certificate.pem(),
            private_key: member_key.serialize_pem(),
        })
    }

    /// Reads a key file: the authority's certificate, the members' certificate, their private key.
    ///
    /// # Errors
    /// The file is something else.
    pub fn from_pem(text: &str) -> Result<ClusterKey, KeyError> {
        let blocks = blocks(text).ok_or(KeyError::NoKey)?;
        match blocks.as_slice() {
            [(CERTIFICATE, authority), (CERTIFICATE, certificate), (PRIVATE_KEY, private_key)] => {
                let [authority, certificate, private_key] =
                    [authority, certificate, private_key].map(|block| format!("{block}\n"));
                Ok(ClusterKey { authority, certificate, private_key })
            }
            _ => Err(KeyError::NoKey),
        }
    }

    /// The key file's text. Whoever reads it belongs to the cluster.
    pub fn to_pem(&self) -> String {
        [self.authority.trim_end(), self.certificate.trim_end(), self.private_key.trim_end(), ""]
            .join("\n")
    }

    /// First digits of the authority certificate's SHA-256: tells keys apart, and tells nothing else.
    pub fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.authority.trim().as_bytes());
        digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Certificate of the authority, PEM.
    pub(crate) fn authority(&self) -> &str {
        &self.authority
    }

    /// Certificate of the members, PEM.
    pub(crate) fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Private key of the members, PEM.
    pub(crate) fn private_key(&self) -> &str {
        &self.private_key
    }
}

/// The PEM blocks of a text, each with its label; `None` where one does not end.
fn blocks(text: &str) -> Option<Vec<(&str, &str)>> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("-----BEGIN ") {
        let block = &rest[start..];
        let label = block.strip_prefix("-----BEGIN ")?.split("-----").next()?;
        let end_line = format!("-----END {label}-----");
        let end = block.find(&end_line)? + end_line.len();
        blocks.push((label, &block[..end]));
        rest = &block[end..];
    }
    Some(blocks)
}

/// Why there is no key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyError {
    /// The text is something else.
    #[error("not a cluster key; make one with \"snnc key new\"")]
    NoKey,
    /// A lifetime beyond the calendar.
    #[error("no date is that far away")]
    Lifetime,
    /// No key could be made.
    #[error("no key made: {reason}")]
    Make {
        /// The library's answer.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_reads_back_and_prints_as_its_fingerprint() {
        let key = ClusterKey::new(Duration::from_secs(60)).unwrap();
        let read = ClusterKey::from_pem(&key.to_pem()).unwrap();
        assert_eq!(read, key);
        let printed = format!("{key:?}");
        assert_eq!(printed, format!("ClusterKey({})", key.fingerprint()));
        assert_ne!(
            key.fingerprint(),
            ClusterKey::new(Duration::from_secs(60)).unwrap().fingerprint()
        );
    }

    #[test]
    fn other_files_are_no_keys() {
        let key = ClusterKey::new(Duration::from_secs(60)).unwrap().to_pem();
        for text in ["", "hello", &key[..key.len() / 2], &key[key.len() / 3..], &key.repeat(2)] {
            assert_eq!(ClusterKey::from_pem(text), Err(KeyError::NoKey));
        }
    }
}
