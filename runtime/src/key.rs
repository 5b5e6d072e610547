//! The key of a cluster: one file that everyone who belongs to it has, and nobody else.
//!
//! [`ClusterKey::new`] makes one, [`ClusterKey::of_one_cluster`] several with times of their own;
//! [`ClusterKey::from_pem`] reads one back. It holds an authority's certificate, and one certificate of
//! that authority with its private key, which all devices share: with it both ends of every connection
//! prove that they belong to the cluster (mutual TLS).
//! The authority's own private key is thrown away, so that nobody can add others later: a new key is
//! a new cluster. Keys are never logged: they print as their fingerprint.
//!
//! HTTPS has an authority apart, whose private key is in the file: whoever has the key makes the
//! certificate that a client expects of the address it asks ([`crate::http::Tls`]). Nothing that it
//! signs lets anybody into the cluster. Keys made before there was HTTPS have none.

use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use x509_parser::pem::parse_x509_pem;

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
    web: Option<Web>,
}

/// The authority for HTTPS, PEM.
#[derive(Clone, PartialEq, Eq)]
struct Web {
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
        let [key] = ClusterKey::of_one_cluster([lifetime])?;
        Ok(key)
    }

    /// Keys of one new cluster, each with a certificate of its own that is good for its lifetime from now on: who
    /// has one proves it to who has another, for as long as both are good.
    ///
    /// # Errors
    /// As [`ClusterKey::new`].
    pub fn of_one_cluster<const KEYS: usize>(
        lifetimes: [Duration; KEYS],
    ) -> Result<[ClusterKey; KEYS], KeyError> {
        let now = OffsetDateTime::now_utc();
        let start = now - CLOCKS_BEHIND;
        let longest = end(now, lifetimes.into_iter().max().unwrap_or_default())?;

        let mut authority = authority_params("snn cluster authority".to_owned())?;
        (authority.not_before, authority.not_after) = (start, longest);
        let authority_key = KeyPair::generate().map_err(make)?;
        let authority_certificate = authority.self_signed(&authority_key).map_err(make)?;
        let issuer = Issuer::new(authority, authority_key);
        let mut cluster = ClusterKey {
            authority: authority_certificate.pem(),
            certificate: String::new(),
            private_key: String::new(),
            web: None,
        };

        let mut web = authority_params(cluster.web_name())?;
        web.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        (web.not_before, web.not_after) = (start, longest);
        let web_key = KeyPair::generate().map_err(make)?;
        let certificate = web.self_signed(&web_key).map_err(make)?.pem();
        cluster.web = Some(Web { certificate, private_key: web_key.serialize_pem() });

        let mut keys: [ClusterKey; KEYS] = std::array::from_fn(|_| cluster.clone());
        for (key, lifetime) in keys.iter_mut().zip(lifetimes) {
            (key.certificate, key.private_key) = member(&issuer, (start, end(now, lifetime)?))?;
        }
        Ok(keys)
    }

    /// Reads a key file: the authority's certificate, the members' certificate, their private key; then
    /// certificate and private key of the authority for HTTPS.
    ///
    /// # Errors
    /// The file is something else.
    pub fn from_pem(text: &str) -> Result<ClusterKey, KeyError> {
        let blocks = blocks(text).ok_or(KeyError::NoKey)?;
        let own = |block: &&str| format!("{block}\n");
        let (
            [(CERTIFICATE, authority), (CERTIFICATE, certificate), (PRIVATE_KEY, private_key)],
            web,
        ) = blocks.split_first_chunk().ok_or(KeyError::NoKey)?
        else {
            return Err(KeyError::NoKey);
        };
        let web = match web {
            [] => None,
            [(CERTIFICATE, certificate), (PRIVATE_KEY, private_key)] => {
                Some(Web { certificate: own(certificate), private_key: own(private_key) })
            }
            _ => return Err(KeyError::NoKey),
        };
        let [authority, certificate, private_key] = [authority, certificate, private_key].map(own);
        Ok(ClusterKey { authority, certificate, private_key, web })
    }

    /// The key file's text. Whoever reads it belongs to the cluster.
    pub fn to_pem(&self) -> String {
        let web = self.web.iter().flat_map(|web| [&web.certificate, &web.private_key]);
        let blocks = [&self.authority, &self.certificate, &self.private_key].into_iter().chain(web);
        blocks.map(|block| format!("{}\n", block.trim_end())).collect()
    }

    /// First digits of the authority certificate's SHA-256: tells keys apart, and tells nothing else.
    pub fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.authority.trim().as_bytes());
        digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Why nobody accepts the key at this time, by the clock of this device; nothing if it is within its time, or
    /// its certificate says none.
    pub fn untimely(&self, now: SystemTime) -> Option<String> {
        let (_, pem) = parse_x509_pem(self.certificate.as_bytes()).ok()?;
        let validity = pem.parse_x509().ok()?.validity().clone();
        let [start, end] = [validity.not_before, validity.not_after].map(|at| at.to_datetime());
        let now = OffsetDateTime::from(now);
        if now < start {
            let (start, now) = (start.date(), now.date());
            Some(format!("good from {start} on, and this device's clock says {now}: set the clock"))
        } else if now > end {
            let end = end.date();
            Some(format!("expired on {end}: nobody accepts it; make another with snnc key new"))
        } else {
            None
        }
    }

    /// Certificate of the authority for HTTPS, PEM: what clients are given, for everybody to see.
    ///
    /// # Errors
    /// [`KeyError::NoWeb`] where the key was made before there was one.
    pub fn web_authority(&self) -> Result<&str, KeyError> {
        self.web.as_ref().map(|web| web.certificate.as_str()).ok_or(KeyError::NoWeb)
    }

    /// What signs certificates for HTTPS.
    ///
    /// # Errors
    /// [`KeyError::NoWeb`] as above; [`KeyError::Make`] where the private key is none.
    pub(crate) fn web_issuer(&self) -> Result<Issuer<'static, KeyPair>, KeyError> {
        let web = self.web.as_ref().ok_or(KeyError::NoWeb)?;
        let private_key = KeyPair::from_pem(&web.private_key).map_err(make)?;
        Ok(Issuer::new(authority_params(self.web_name())?, private_key))
    }

    /// The name of the authority for HTTPS: another for each cluster, so that a client may know several.
    fn web_name(&self) -> String {
        format!("snn cluster {}", self.fingerprint())
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

/// When what is made now and is good for `lifetime` ends.
fn end(now: OffsetDateTime, lifetime: Duration) -> Result<OffsetDateTime, KeyError> {
    let lifetime = lifetime.try_into().map_err(|_| KeyError::Lifetime)?;
    now.checked_add(lifetime).ok_or(KeyError::Lifetime)
}

/// A members' certificate that is good from the first date to the second, and its private key, both PEM.
fn member(
    issuer: &Issuer<'static, KeyPair>,
    (start, end): (OffsetDateTime, OffsetDateTime),
) -> Result<(String, String), KeyError> {
    let mut member = CertificateParams::new(vec!["snn".to_owned()]).map_err(make)?;
    member.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    member.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    member.distinguished_name.push(DnType::CommonName, "snn cluster member");
    (member.not_before, member.not_after) = (start, end);
    let private_key = KeyPair::generate().map_err(make)?;
    let certificate = member.signed_by(&private_key, issuer).map_err(make)?;
    Ok((certificate.pem(), private_key.serialize_pem()))
}

/// An authority of this name, whose dates are the caller's.
fn authority_params(name: String) -> Result<CertificateParams, KeyError> {
    let mut params = CertificateParams::new(Vec::new()).map_err(make)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    // Rather than the library's own name.
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

fn make(error: rcgen::Error) -> KeyError {
    KeyError::Make { reason: error.to_string() }
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
    /// A key made before there was HTTPS.
    #[error("the key has no authority for HTTPS; make a new one with \"snnc key new\"")]
    NoWeb,
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
    fn a_key_out_of_its_time_says_so() {
        let key = ClusterKey::new(Duration::from_secs(3600)).unwrap();
        let now = SystemTime::now();
        let days = |days: u64| Duration::from_secs(days * 24 * 3600);
        let said = |at| key.untimely(at);
        assert_eq!(said(now), None);
        assert_eq!(said(now - days(1)), None, "clocks may be behind");
        let early = said(SystemTime::UNIX_EPOCH).unwrap();
        assert!(early.ends_with("this device's clock says 1970-01-01: set the clock"), "{early}");
        let late = said(now + days(1)).unwrap();
        assert!(late.starts_with("expired on 2") && late.contains("snnc key new"), "{late}");
    }

    #[test]
    fn keys_of_one_cluster_differ_in_their_members_certificate_alone() {
        let [long, short] = ClusterKey::of_one_cluster([60, 30].map(Duration::from_secs)).unwrap();
        assert!(long.authority == short.authority && long.web == short.web);
        assert!(long.certificate != short.certificate && long.private_key != short.private_key);
        let between = SystemTime::now() + Duration::from_secs(45);
        assert!(long.untimely(between).is_none() && short.untimely(between).is_some());
    }

    #[test]
    fn other_files_are_no_keys() {
        let key = ClusterKey::new(Duration::from_secs(60)).unwrap().to_pem();
        for text in ["", "hello", &key[..key.len() / 2], &key[key.len() / 3..], &key.repeat(2)] {
            assert_eq!(ClusterKey::from_pem(text), Err(KeyError::NoKey));
        }
    }

    #[test]
    fn a_key_without_an_authority_for_https_is_a_key() {
        let key = ClusterKey::new(Duration::from_secs(60)).unwrap();
        let (text, before) = (key.to_pem(), ClusterKey { web: None, ..key.clone() }.to_pem());
        assert!(text.starts_with(&before) && text.ends_with(&key.web.unwrap().private_key));
        let read = ClusterKey::from_pem(&before).unwrap();
        assert_eq!(read.to_pem(), before);
        assert_eq!(read.web_authority(), Err(KeyError::NoWeb));
    }
}
