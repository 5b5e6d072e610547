//! HTTPS: who a node proves to be, and the handshake in which it does.
//!
//! [`Tls::of_cluster`] takes the cluster's key: each client is shown a certificate of the key's authority for
//! HTTPS that is made for it, with the name it asks for and the address it has reached. So
//! there are no names to configure and none to go out of date; what a client learns is that whoever
//! answers has the key. [`Tls::of_pem`] takes a certificate of the owner's own.
//!
//! A handshake ends within [`HANDSHAKE_WITHIN`]. Who speaks HTTP without TLS is told so in HTTP. TLS is
//! of version 1.3. Clients prove nothing: HTTPS hides what is said and shows who answers, no more.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::server::{Acceptor, ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::{CertifiedKey, SigningKey};
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;

use super::impatient::Impatient;
use crate::key::{ClusterKey, KeyError};

/// How long a handshake may take: a second's work of a slow device behind a slow link, and some losses.
pub const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// A certificate is made for one handshake; clocks may differ by this much.
const CLOCKS_DIFFER: Duration = Duration::from_secs(2 * 24 * 3600);
/// First byte of every TLS connection: a record of the handshake.
const HANDSHAKE_RECORD: u8 = 22;
/// What is read of a request that came without TLS, so that its sender is not cut off before it reads.
const PLAIN_BYTES: usize = 16 << 10;
/// Said to who speaks HTTP.
const PLAIN_ANSWER: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n\
    connection: close\r\n\r\n{\"error\":\"this address speaks HTTPS only\"}";

/// How HTTP is encrypted.
pub struct Tls {
    config: ServerConfig,
    proof: Proof,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.proof {
            Proof::Cluster { .. } => "Tls(cluster)",
            Proof::Own(_) => "Tls(own)",
        })
    }
}

/// How the node proves who it is.
enum Proof {
    /// With a certificate made for whoever asks.
    Cluster {
        issuer: Box<Issuer<'static, KeyPair>>,
        pair: Box<KeyPair>,
        signing: Arc<dyn SigningKey>,
    },
    /// With one certificate.
    Own(Arc<CertifiedKey>),
}

/// Why there is no HTTPS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The cluster's key has no authority for HTTPS, or a broken one.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A file without a certificate, or a broken one.
    #[error("no certificate in PEM: {reason}")]
    Certificate {
        /// The library's answer.
        reason: String,
    },
    /// A file without a private key, or a broken one.
    #[error("no private key in PEM: {reason}")]
    PrivateKey {
        /// The library's answer.
        reason: String,
    },
    /// A private key of another certificate.
    #[error("certificate and private key do not belong together")]
    Pair,
}

impl Tls {
    /// HTTPS with certificates of the cluster's authority.
    ///
    /// # Errors
    /// [`TlsError::Key`].
    pub fn of_cluster(key: &ClusterKey) -> Result<Tls, TlsError> {
        let make = |reason: String| TlsError::Key(KeyError::Make { reason });
        let issuer = Box::new(key.web_issuer()?);
        let pair = KeyPair::generate().map_err(|error| make(error.to_string()))?;
        let der = PrivatePkcs8KeyDer::from(pair.serialize_der());
        let signing = provider().key_provider.load_private_key(der.into());
        let signing = signing.map_err(|error| make(error.to_string()))?;
        Tls::new(Proof::Cluster { issuer, pair: Box::new(pair), signing })
    }

    /// HTTPS with a certificate and its private key, both PEM; certificates of authorities in between follow
    /// the first one.
    ///
    /// # Errors
    /// What is wrong with either, or that they do not belong together.
    pub fn of_pem(certificates: &[u8], private_key: &[u8]) -> Result<Tls, TlsError> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificates).collect();
        let chain = chain.map_err(|error| TlsError::Certificate { reason: error.to_string() })?;
        if chain.is_empty() {
            return Err(TlsError::Certificate { reason: "nothing between BEGIN and END".into() });
        }
        let private_key = PrivateKeyDer::from_pem_slice(private_key)
            .map_err(|error| TlsError::PrivateKey { reason: error.to_string() })?;
        let signing = provider().key_provider.load_private_key(private_key);
        let signing =
            signing.map_err(|error| TlsError::PrivateKey { reason: error.to_string() })?;
        let certified = CertifiedKey::new(chain, signing);
        match certified.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(rustls::Error::InconsistentKeys(_)) => return Err(TlsError::Pair),
            Err(error) => return Err(TlsError::Certificate { reason: error.to_string() }),
        }
        Tls::new(Proof::Own(Arc::new(certified)))
    }

    fn new(proof: Proof) -> Result<Tls, TlsError> {
        let make = |error: rustls::Error| KeyError::Make { reason: error.to_string() };
        let versions = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13]);
        // Whose certificate it is turns out with each client.
        let nobody = Arc::new(Shown(None));
        let mut config = versions.map_err(make)?.with_no_client_auth().with_cert_resolver(nobody);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Tls { config, proof })
    }

    /// Shakes hands with whoever has connected, and whose connection ends where he takes nothing of what
    /// is written for `write_within`.
    ///
    /// # Errors
    /// It took too long, or was no handshake.
    pub(super) async fn accept(
        &self,
        stream: TcpStream,
        write_within: Duration,
    ) -> io::Result<TlsStream<Impatient<TcpStream>>> {
        let shaken = self.shake(stream, write_within);
        let shaken = tokio::time::timeout(HANDSHAKE_WITHIN, shaken).await;
        shaken.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    async fn shake(
        &self,
        mut stream: TcpStream,
        write_within: Duration,
    ) -> io::Result<TlsStream<Impatient<TcpStream>>> {
        let mut first = [0];
        stream.peek(&mut first).await?;
        if first != [HANDSHAKE_RECORD] {
            let mut request = vec![0; PLAIN_BYTES];
            let _ = stream.read(&mut request).await?;
            stream.write_all(PLAIN_ANSWER).await?;
            stream.shutdown().await?;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not TLS"));
        }
        let address = stream.local_addr()?.ip().to_canonical();
        let stream = Impatient::new(stream, write_within);
        let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let shown = self.shown(hello.client_hello().server_name(), address)?;
        let mut config = self.config.clone();
        config.cert_resolver = Arc::new(Shown(Some(shown)));
        hello.into_stream(Arc::new(config)).await
    }

    /// What is shown to a client that asks for `name`, if it does, at `address`.
    fn shown(&self, name: Option<&str>, address: IpAddr) -> io::Result<Arc<CertifiedKey>> {
        match &self.proof {
            Proof::Own(certified) => Ok(Arc::clone(certified)),
            Proof::Cluster { issuer, pair, signing } => {
                let certificate = certificate(issuer, pair, (name, address));
                let chain = vec![certificate.map_err(io::Error::other)?];
                Ok(Arc::new(CertifiedKey::new(chain, Arc::clone(signing))))
            }
        }
    }
}

/// A certificate for a name, an address, and this machine's own, as behind a tunnel.
fn certificate(
    issuer: &Issuer<'static, KeyPair>,
    pair: &KeyPair,
    (name, address): (Option<&str>, IpAddr),
) -> Result<CertificateDer<'static>, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    if let Some(name) = name {
        params.subject_alt_names.push(SanType::DnsName(name.try_into()?));
    }
    for address in [address, Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        let address = SanType::IpAddress(address);
        if !params.subject_alt_names.contains(&address) {
            params.subject_alt_names.push(address);
        }
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    // Strict clients want to know whose key signed it.
    params.use_authority_key_identifier_extension = true;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "snn node");
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - CLOCKS_DIFFER, now + CLOCKS_DIFFER);
    Ok(params.signed_by(pair, issuer)?.into())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Shows one certificate.
#[derive(Debug)]
struct Shown(Option<Arc<CertifiedKey>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }
}
