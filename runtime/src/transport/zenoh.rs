//! The transport between devices: zenoh peers over TCP.
//!
//! Takes [`Options`] (where to listen, whom to connect to) and gives first a [`Link`], which is bound
//! and connecting but in no cluster yet, and from it, with the node's [`Identity`] and sink, a
//! [`ZenohTransport`]. Guarantees:
//!
//! - Frames to one rank arrive whole and in order, or the connection ends and `PeerDown` says so.
//! - `PeerUp` is given only once frames to that rank arrive: a node announces itself
//!   (`snn/alive/<split>/<rank>/<session>`, a liveliness token) after it listens to its frames
//!   (`snn/<split, first 16 digits>/<rank>`). Nodes of other splits are announced too, so that the
//!   node can refuse them.
//! - Lost connections are tried again for as long as the link lives.
//! - Nothing is looked for by multicast. Connected nodes tell each other whom they know (gossip), so
//!   one address of a cluster is enough to join all of it.
//!
//! A payload is handed to zenoh without a copy, and copied once on arrival.

use std::collections::BTreeMap;
use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use zenoh::bytes::ZBytes;
use zenoh::liveliness::LivelinessToken;
use zenoh::pubsub::{Publisher, Subscriber};
use zenoh::qos::{CongestionControl, Priority};
use zenoh::sample::{Sample, SampleKind};
use zenoh::{Config, Session, Wait as _};

use super::{BoxFuture, Event, Sink, Transport, TransportError};

/// Where a node listens when nobody says otherwise: on this machine only, on a free port.
pub const DEFAULT_LISTEN: &str = "tcp/127.0.0.1:0";

/// Largest message taken from a peer, in bytes. Zenoh puts a fragmented message together before we
/// see any of it: this bounds that memory before a peer is trusted.
pub const MAX_MESSAGE: usize = snn_schemas::wire::MAX_FRAME + MESSAGE_SLACK;

/// What zenoh adds to a payload at most: key, sizes, sequence numbers.
const MESSAGE_SLACK: usize = 4096;
/// Silence after which a connection counts as lost, in ms; zenoh says something four times as often.
/// A device that loses power is noticed after this; a process that dies, at once.
const LEASE_MS: u64 = 4_000;
/// How long a full send queue may block before the connection is closed, in µs: longer than any
/// hiccup of a working network, shorter than what a request may take.
const BLOCK_LIMIT_US: u64 = 5_000_000;
/// Batches of 64 KiB queued a connection before a send blocks: zenoh's maximum, 1 MiB, more than
/// any one exchange of the networks in use.
const QUEUE_BATCHES: usize = 16;
/// First and longest pause between attempts to connect, in ms: quick on start, quiet later.
const RETRY_MS: (u64, u64) = (100, 2_000);
/// Connections accepted at once: every node of a large cluster and as many clients.
const MAX_SESSIONS: usize = 64;
/// Attempts at a free port: between finding one and taking it another process may take it.
const PORT_ATTEMPTS: usize = 16;
/// Digits of the split that frames carry in their key: enough to tell splits apart, short enough
/// not to matter (zenoh sends a key once a connection, and its number afterwards).
const SPLIT_DIGITS: usize = 16;

/// Where to listen, and whom to connect to.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address to listen on; port 0 takes a free one.
    pub listen: String,
    /// Addresses of other nodes; one of a cluster is enough, more do no harm.
    pub peers: Vec<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options { listen: DEFAULT_LISTEN.to_owned(), peers: Vec::new() }
    }
}

/// Who a node is, as far as its peers care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Identity of the split, 64 hexadecimal digits.
    pub split: String,
    /// The node's rank.
    pub rank: usize,
    /// Nodes of the cluster.
    pub nodes: usize,
}

/// Brings an address into zenoh's form: `tcp/host:port`, where `tcp/` may be left out.
///
/// # Errors
/// [`LinkError::Address`] for anything else.
pub fn parse_address(text: &str) -> Result<String, LinkError> {
    let place = text.strip_prefix("tcp/").unwrap_or(text);
    let sound = place.rsplit_once(':').is_some_and(|(host, port)| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.[]:%".contains(c);
        !host.is_empty() && host.chars().all(plain) && port.parse::<u16>().is_ok()
    });
    match sound {
        true => Ok(format!("tcp/{place}")),
        false => Err(LinkError::Address { found: text.to_owned() }),
    }
}

/// An open session: bound, and connecting in the background, but part of no cluster yet.
#[derive(Clone, Debug)]
pub struct Link {
    session: Session,
    address: String,
}

impl Link {
    /// Binds the address and starts connecting to the peers.
    ///
    /// Needs tokio's multi-thread scheduler, as zenoh does.
    ///
    /// # Errors
    /// An unusable address, or one that cannot be bound.
    pub async fn open(options: &Options) -> Result<Link, LinkError> {
        let listen = parse_address(&options.listen)?;
        let peers: Vec<String> =
            options.peers.iter().map(|peer| parse_address(peer)).collect::<Result<_, _>>()?;
        let mut last = String::new();
        for _ in 0..PORT_ATTEMPTS {
            let address = free_address(&listen)?;
            match zenoh::open(node_config(&address, &peers)?).await {
                Ok(session) => return Ok(Link { session, address }),
                Err(error) => last = one_line(&error),
            }
        }
        Err(LinkError::Session { reason: last })
    }

    /// The address that other nodes can connect to, with its real port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The session, for queries beside the frames.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Joins a cluster: from here on `sink` gets the node's frames and news of its peers.
    ///
    /// # Errors
    /// [`LinkError::Session`] when the session has ended.
    pub async fn join(&self, identity: &Identity, sink: Sink) -> Result<ZenohTransport, LinkError> {
        let publishers = self.publishers(identity).await?;
        let frames = self.frames(identity, sink.clone()).await?;
        let peers = self.peers(identity, sink).await?;
        let zid = self.session.zid();
        let key = format!("{ALIVE}/{}/{}/{zid}", identity.split, identity.rank);
        let token = self.session.liveliness().declare_token(key).await.map_err(session_error)?;
        Ok(ZenohTransport { publishers, _frames: frames, _peers: peers, _token: token })
    }

    async fn publishers(&self, identity: &Identity) -> Result<Vec<Publisher<'static>>, LinkError> {
        let mut publishers = Vec::with_capacity(identity.nodes);
        for rank in 0..identity.nodes {
            let publisher = self
                .session
                .declare_publisher(frame_key(&identity.split, rank))
                .express(true)
                .priority(Priority::RealTime)
                .congestion_control(CongestionControl::Block)
                .await
                .map_err(session_error)?;
            publishers.push(publisher);
        }
        Ok(publishers)
    }

    async fn frames(&self, identity: &Identity, sink: Sink) -> Result<Subscriber<()>, LinkError> {
        let on_sample = move |sample: Sample| match into_bytes(sample.payload()) {
            Some(bytes) => sink(Event::Frame { bytes }),
            None => tracing::warn!(bytes = sample.payload().len(), "frame dropped: too large"),
        };
        self.session
            .declare_subscriber(frame_key(&identity.split, identity.rank))
            .callback(on_sample)
            .await
            .map_err(session_error)
    }

    async fn peers(&self, identity: &Identity, sink: Sink) -> Result<Subscriber<()>, LinkError> {
        let own = self.session.zid().to_string();
        let cluster = identity.split.clone();
        let present = Mutex::new(Presence::default());
        let on_token = move |sample: Sample| {
            let key = sample.key_expr().as_str();
            let Some((split, rank, session)) = parse_alive(key) else {
                tracing::warn!(key, "unknown announcement ignored");
                return;
            };
            if session == own {
                return;
            }
            // The lock is held while the sink is told, so that it hears of changes in their order.
            let mut present = present.lock().unwrap_or_else(PoisonError::into_inner);
            let up = sample.kind() == SampleKind::Put;
            match present.change(split, rank, session, up) {
                // That a node of another split has left says nothing about ours.
                Some(Event::PeerDown { .. }) if split != cluster => {}
                Some(event) => sink(event),
                None => {}
            }
        };
        self.session
            .liveliness()
            .declare_subscriber(format!("{ALIVE}/**"))
            .history(true)
            .callback(on_token)
            .await
            .map_err(session_error)
    }

    /// Ends the session: peers see the node leave at once.
    ///
    /// # Errors
    /// [`LinkError::Session`] when it does not end within zenoh's ten seconds.
    pub async fn close(&self) -> Result<(), LinkError> {
        self.session.close().await.map_err(session_error)
    }
}

const ALIVE: &str = "snn/alive";

/// Which sessions have announced which node. A node that restarts may be seen to come before it is
/// seen to go: it is up while any session announces it.
#[derive(Default)]
struct Presence(BTreeMap<(String, usize), Vec<String>>);

impl Presence {
    fn change(&mut self, split: &str, rank: usize, session: &str, up: bool) -> Option<Event> {
        let sessions = self.0.entry((split.to_owned(), rank)).or_default();
        let before = sessions.len();
        sessions.retain(|known| known != session);
        if up {
            sessions.push(session.to_owned());
        }
        match (before, sessions.len()) {
            (0, 1) => Some(Event::PeerUp { rank, split: split.to_owned() }),
            (1, 0) => Some(Event::PeerDown { rank }),
            _ => None,
        }
    }
}

/// A node's connection to its cluster. Dropping it leaves the cluster; the [`Link`] stays open.
#[derive(Debug)]
pub struct ZenohTransport {
    publishers: Vec<Publisher<'static>>,
    _frames: Subscriber<()>,
    _peers: Subscriber<()>,
    _token: LivelinessToken,
}

impl Transport for ZenohTransport {
    fn send(&self, to: usize, frame: Bytes) -> BoxFuture<'_, Result<(), TransportError>> {
        Box::pin(async move {
            let publisher = self.publishers.get(to).ok_or(TransportError::Unreachable { rank: to })?;
            // Zenoh queues the frame at once, and blocks the thread while its queue is full.
            let sent = tokio::task::block_in_place(|| publisher.put(frame).wait());
            sent.map_err(|error| TransportError::Send { rank: to, reason: one_line(&error) })
        })
    }
}

/// One contiguous buffer, with one copy; `None` for more than [`MAX_MESSAGE`].
pub(crate) fn into_bytes(payload: &ZBytes) -> Option<Bytes> {
    if payload.len() > MAX_MESSAGE {
        return None;
    }
    Some(match payload.to_bytes() {
        std::borrow::Cow::Owned(joined) => Bytes::from(joined),
        std::borrow::Cow::Borrowed(slice) => Bytes::copy_from_slice(slice),
    })
}

/// First digits of a split, as keys carry them.
pub(crate) fn split_prefix(split: &str) -> &str {
    split.get(..SPLIT_DIGITS).unwrap_or(split)
}

fn frame_key(split: &str, rank: usize) -> String {
    format!("snn/{}/{rank}", split_prefix(split))
}

fn parse_alive(key: &str) -> Option<(&str, usize, &str)> {
    let mut parts = key.strip_prefix(ALIVE)?.strip_prefix('/')?.split('/');
    let (split, rank, session) = (parts.next()?, parts.next()?, parts.next()?);
    let hexadecimal = split.len() == 64 && split.bytes().all(|b| b.is_ascii_hexdigit());
    let rank = rank.parse().ok().filter(|&rank| rank < snn_schemas::MAX_GROUPS)?;
    (hexadecimal && parts.next().is_none()).then_some((split, rank, session))
}

/// The address with a port that is free now, or an error that says why there is none.
fn free_address(listen: &str) -> Result<String, LinkError> {
    let error = |source| LinkError::Listen { address: listen.to_owned(), source };
    let place = listen.strip_prefix("tcp/").unwrap_or(listen);
    let sockets: Vec<_> = place.to_socket_addrs().map_err(error)?.collect();
    let probe = TcpListener::bind(sockets.as_slice()).map_err(error)?;
    Ok(format!("tcp/{}", probe.local_addr().map_err(error)?))
}

fn node_config(listen: &str, peers: &[String]) -> Result<Config, LinkError> {
    let (first, longest) = RETRY_MS;
    let retry = format!(
        "{{period_init_ms:{first},period_max_ms:{longest},period_increase_factor:1.5}}"
    );
    let mut entries = vec![
        ("mode", "\"peer\"".to_owned()),
        ("listen/endpoints", format!("[{listen:?}]")),
        ("connect/endpoints", format!("{peers:?}")),
        ("connect/retry", retry),
        ("open/return_conditions/connect_scouted", "false".to_owned()),
        ("scouting/gossip/autoconnect", "{peer:[\"router\",\"peer\"]}".to_owned()),
        ("transport/unicast/max_sessions", MAX_SESSIONS.to_string()),
    ];
    entries.extend(shared_entries());
    config(entries)
}

/// The settings of a session that only asks: connected to one node, listening to nobody.
pub(crate) fn client_config(node: &str) -> Result<Config, LinkError> {
    let mut entries = vec![
        ("mode", "\"client\"".to_owned()),
        ("connect/endpoints", format!("[{node:?}]")),
        ("scouting/gossip/enabled", "false".to_owned()),
    ];
    entries.extend(shared_entries());
    config(entries)
}

fn shared_entries() -> [(&'static str, String); 5] {
    [
        ("scouting/multicast/enabled", "false".to_owned()),
        ("transport/link/tx/lease", LEASE_MS.to_string()),
        ("transport/link/tx/queue/size/real_time", QUEUE_BATCHES.to_string()),
        (
            "transport/link/tx/queue/congestion_control/block/wait_before_close",
            BLOCK_LIMIT_US.to_string(),
        ),
        ("transport/link/rx/max_message_size", MAX_MESSAGE.to_string()),
    ]
}

fn config(entries: Vec<(&'static str, String)>) -> Result<Config, LinkError> {
    let mut config = Config::default();
    for (key, value) in entries {
        config.insert_json5(key, &value).map_err(|error| LinkError::Setting {
            key,
            value,
            reason: one_line(&error),
        })?;
    }
    Ok(config)
}

pub(crate) fn session_error(error: zenoh::Error) -> LinkError {
    LinkError::Session { reason: one_line(&error) }
}

/// Zenoh's error without the source position it ends in, on one line.
pub(crate) fn one_line(error: &zenoh::Error) -> String {
    let text = error.to_string();
    let text = text.split(" at /").next().unwrap_or(&text);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// An address of another form.
    #[error("address \"{found}\", expected tcp/HOST:PORT or HOST:PORT")]
    Address {
        /// What was given.
        found: String,
    },
    /// The address cannot be listened on.
    #[error("listen on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A setting that this version of zenoh does not take.
    #[error("zenoh setting {key} = {value}: {reason}")]
    Setting {
        /// Its name.
        key: &'static str,
        /// Its value.
        value: String,
        /// Zenoh's answer.
        reason: String,
    },
    /// The session cannot be opened, or has ended.
    #[error("zenoh: {reason}")]
    Session {
        /// Zenoh's answer.
        reason: String,
    },
    /// Nobody answers at the address of a node.
    #[error("nobody answers at {address} within {} s", within.as_secs_f32())]
    Connect {
        /// The address.
        address: String,
        /// How long an answer was waited for.
        within: Duration,
    },
}
