//! The transport between devices: zenoh peers over TCP, or mutual TLS for those with a key.
//!
//! Takes [`Options`] (where to listen, whom to connect to) and gives first a [`Link`], which is bound
//! and connecting but in no cluster yet, and from it, with the node's [`Identity`] and sink, a
//! [`ZenohTransport`]. Guarantees:
//!
//! - Frames to one rank arrive whole and in order, or the connection ends and `PeerDown` says so.
//! - `PeerUp` is given only once frames to that rank arrive: a node announces itself
//!   (`snn/alive/<split>/<rank>/<role>/<session>`, a liveliness token) after it listens to its frames
//!   (`snn/<split, first 16 digits>/<rank>`). Nodes of other splits are announced too, so that the
//!   node can refuse them.
//! - When one of those who compute a rank leaves and another is left, `PeerChanged` is given: what the one knew
//!   of requests in flight the other may not.
//! - Lost connections are tried again for as long as the link lives.
//! - Connected nodes tell each other whom they know (gossip), so one address of a cluster is enough
//!   to join all of it; none is needed where multicast reaches ([`Options::scout`]).
//! - Nodes that cannot reach each other meet through a zenoh router. Routers pass on what clients say,
//!   but nothing between two peers (since zenoh 1.10), so such a node is a client of its router
//!   ([`Options::through_router`]); it listens to nobody then, and is asked at the router's address.
//! - With a [`ClusterKey`] nothing is said to anybody who cannot prove to have it.
//!
//! A payload is handed to zenoh without a copy, and copied once on arrival.

mod settings;

use std::collections::BTreeMap;
use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use zenoh::bytes::ZBytes;
use zenoh::liveliness::LivelinessToken;
use zenoh::pubsub::{Publisher, Subscriber};
use zenoh::qos::{CongestionControl, Priority};
use zenoh::sample::{Sample, SampleKind};
use zenoh::{Session, Wait as _};

pub use settings::{FROZEN_AFTER, MAX_MESSAGE};
pub(crate) use settings::{client_config, scout_config};

use self::settings::{RETRY_MS, node_config};
use super::{BoxFuture, Event, Sink, Transport, TransportError};
use crate::key::ClusterKey;
use crate::membership::{ALIVE, Announcement, Members, Role, complete_key};

/// Where a node listens when nobody says otherwise: on this machine only, on a free port.
pub const DEFAULT_LISTEN: &str = "tcp/127.0.0.1:0";

/// Attempts at a free port: between finding one and taking it another process may take it.
const PORT_ATTEMPTS: usize = 16;
/// Digits of the split that frames carry in their key: enough to tell splits apart, short enough
/// not to matter (zenoh sends a key once a connection, and its number afterwards).
const SPLIT_DIGITS: usize = 16;

/// Where to listen, whom to connect to, and whom to trust.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address to listen on; port 0 takes a free one.
    pub listen: String,
    /// Addresses of other nodes; one of a cluster is enough, more do no harm.
    pub peers: Vec<String>,
    /// What the members of the cluster have in common. With it every connection is mutual TLS;
    /// without, anybody who can connect takes part.
    pub key: Option<ClusterKey>,
    /// Whether to listen beyond this machine without a key.
    pub insecure: bool,
    /// Looks by multicast for others who look for the same name; nobody is looked for without one.
    pub scout: Option<String>,
    /// Whether to reach the cluster through the first router among the peers alone.
    pub through_router: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            listen: DEFAULT_LISTEN.to_owned(),
            peers: Vec::new(),
            key: None,
            insecure: false,
            scout: None,
            through_router: false,
        }
    }
}

impl Options {
    /// Refuses to listen beyond this machine where neither a key nor the user's own word allows it.
    fn check(&self) -> Result<(), LinkError> {
        let place = place(&self.listen);
        let local =
            place.to_socket_addrs().is_ok_and(|mut found| found.all(|a| a.ip().is_loopback()));
        match self.key.is_some() || self.insecure || local {
            true => Ok(()),
            false => Err(LinkError::Exposed { address: place.to_owned() }),
        }
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
    /// Whether the process was started for this rank, or stands in for another.
    pub role: Role,
}

/// `host:port` of an address in any of its forms.
pub(crate) fn place(address: &str) -> &str {
    address.strip_prefix("tcp/").or(address.strip_prefix("tls/")).unwrap_or(address)
}

/// Brings an address into zenoh's form: `tcp/host:port`, or `tls/host:port` for those with a key,
/// where the scheme may be left out.
///
/// # Errors
/// [`LinkError::Address`] for anything else.
pub fn parse_address(text: &str, key: Option<&ClusterKey>) -> Result<String, LinkError> {
    let place = place(text);
    let sound = place.rsplit_once(':').is_some_and(|(host, port)| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.[]:%".contains(c);
        !host.is_empty() && host.chars().all(plain) && port.parse::<u16>().is_ok()
    });
    let scheme = if key.is_some() { "tls" } else { "tcp" };
    let fits = text == place || text.starts_with(scheme);
    match sound && fits {
        true => Ok(format!("{scheme}/{place}")),
        false => Err(LinkError::Address { found: text.to_owned(), scheme }),
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
        match options.through_router {
            true => Link::open_through_router(options).await,
            false => Link::open_with(options, &[]).await,
        }
    }

    /// Opens a router: a process at which nodes meet that cannot reach each other.
    ///
    /// # Errors
    /// As [`Link::open`].
    pub async fn open_router(options: &Options) -> Result<Link, LinkError> {
        Link::open_with(options, &[("mode", "\"router\"")]).await
    }

    /// Waits for the first router among the peers, and connects to it and nobody else.
    async fn open_through_router(options: &Options) -> Result<Link, LinkError> {
        let key = options.key.as_ref();
        let peers: Vec<String> =
            options.peers.iter().map(|peer| parse_address(peer, key)).collect::<Result<_, _>>()?;
        loop {
            for peer in &peers {
                let opened = zenoh::open(client_config(std::slice::from_ref(peer), key)?).await;
                if let Ok(session) = opened {
                    let link = Link { session, address: peer.clone() };
                    if link.meets_router().await {
                        return Ok(link);
                    }
                    link.close().await?;
                }
            }
            tokio::time::sleep(Duration::from_millis(RETRY_MS.1)).await;
        }
    }

    /// The same for a process that is found and connected to, and connects to nobody by itself.
    ///
    /// # Errors
    /// As [`Link::open`].
    pub async fn open_apart(options: &Options) -> Result<Link, LinkError> {
        let nobody = "{router:[],peer:[],client:[]}";
        let apart =
            [("scouting/multicast/autoconnect", nobody), ("scouting/gossip/enabled", "false")];
        Link::open_with(options, &apart).await
    }

    async fn open_with(
        options: &Options,
        more: &[(&'static str, &str)],
    ) -> Result<Link, LinkError> {
        let key = options.key.as_ref();
        let listen = parse_address(&options.listen, key)?;
        options.check()?;
        let peers: Vec<String> =
            options.peers.iter().map(|peer| parse_address(peer, key)).collect::<Result<_, _>>()?;
        let mut last = String::new();
        for _ in 0..PORT_ATTEMPTS {
            let address = free_address(&listen)?;
            match zenoh::open(node_config(&address, &peers, options, more)?).await {
                Ok(session) => return Ok(Link { session, address }),
                Err(error) => last = one_line(&error),
            }
        }
        Err(LinkError::Session { reason: last })
    }

    /// The address that other nodes can connect to, with its real port; the router's where the cluster
    /// is reached through one.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether one of those connected is a router.
    pub async fn meets_router(&self) -> bool {
        self.session.info().routers_zid().await.next().is_some()
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
        let announcement = Announcement {
            split: identity.split.clone(),
            rank: identity.rank,
            role: identity.role,
            session: self.id(),
        };
        let token = self.session.liveliness().declare_token(announcement.key());
        let token = token.await.map_err(session_error)?;
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
        let (own, rank) = (self.id(), identity.rank);
        let cluster = identity.split.clone();
        let present = Mutex::new(Presence::default());
        let on_token = move |announcement: Announcement, up: bool| {
            if announcement.session == own && announcement.rank == rank {
                return;
            }
            // The lock is held while the sink is told, so that it hears of changes in their order.
            let mut present = present.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(event) = present.change(announcement, up, &cluster) {
                sink(event);
            }
        };
        self.announcements(format!("{ALIVE}/**"), on_token).await
    }

    /// Tells `take` of every announcement under `keys` that is made (true) or ends (false).
    async fn announcements(
        &self,
        keys: String,
        take: impl Fn(Announcement, bool) + Send + Sync + 'static,
    ) -> Result<Subscriber<()>, LinkError> {
        let on_token = move |sample: Sample| match Announcement::parse(sample.key_expr().as_str()) {
            Some(announcement) => take(announcement, sample.kind() == SampleKind::Put),
            None => {
                let key = sample.key_expr().as_str();
                tracing::warn!(key, "unknown announcement ignored");
            }
        };
        self.session
            .liveliness()
            .declare_subscriber(keys)
            .history(true)
            .callback(on_token)
            .await
            .map_err(session_error)
    }

    /// What is announced of a split, now and from now on, while the result is kept.
    ///
    /// # Errors
    /// [`LinkError::Session`] when the session has ended.
    pub(crate) async fn members(
        &self,
        split: &str,
    ) -> Result<(watch::Receiver<Members>, Watch), LinkError> {
        let (changed, members) = watch::channel(Members::default());
        let told = changed.clone();
        let on_token = move |Announcement { rank, role, session, .. }: Announcement, up: bool| {
            changed.send_modify(|members| match (role, up) {
                (Role::Home, true) => {
                    members.homes.entry(rank).or_default().insert(session);
                }
                (Role::Home, false) => {
                    members.homes.entry(rank).or_default().remove(&session);
                }
                (Role::Guest, true) => {
                    members.stood_in_for.insert(rank);
                }
                (Role::Guest, false) => {}
            });
        };
        let homes = self.announcements(format!("{ALIVE}/{split}/**"), on_token).await?;
        let on_complete = move |_: Sample| {
            told.send_if_modified(|members| !std::mem::replace(&mut members.told_complete, true));
        };
        let complete = self
            .session
            .liveliness()
            .declare_subscriber(complete_key(split, "*"))
            .history(true)
            .callback(on_complete)
            .await
            .map_err(session_error)?;
        Ok((members, Watch { _homes: homes, _complete: complete }))
    }

    /// Says that the cluster of a split has been complete, for as long as the result is kept.
    ///
    /// # Errors
    /// [`LinkError::Session`] when the session has ended.
    pub(crate) async fn announce_complete(&self, split: &str) -> Result<Told, LinkError> {
        let token = self.session.liveliness().declare_token(complete_key(split, &self.id()));
        Ok(Told { _token: token.await.map_err(session_error)? })
    }

    /// The process, as announcements name it.
    pub(crate) fn id(&self) -> String {
        self.session.zid().to_string()
    }

    /// Ends the session: peers see the node leave at once.
    ///
    /// # Errors
    /// [`LinkError::Session`] when it does not end within zenoh's ten seconds.
    pub async fn close(&self) -> Result<(), LinkError> {
        self.session.close().await.map_err(session_error)
    }
}

/// Keeps what [`Link::members`] gives up to date.
pub(crate) struct Watch {
    _homes: Subscriber<()>,
    _complete: Subscriber<()>,
}

/// Keeps what [`Link::announce_complete`] says.
pub(crate) struct Told {
    _token: LivelinessToken,
}

/// Which announcements are made for each rank of each split.
#[derive(Default)]
struct Presence(BTreeMap<(String, usize), Vec<Announcement>>);

impl Presence {
    /// What a node of `cluster` is told when an announcement is made or ends.
    fn change(&mut self, announcement: Announcement, up: bool, cluster: &str) -> Option<Event> {
        let Announcement { split, rank, role, .. } = announcement.clone();
        let known = self.0.entry((split.clone(), rank)).or_default();
        let before = known.len();
        known.retain(|known| *known != announcement);
        if up {
            known.push(announcement);
        }
        match (before, known.len()) {
            (0, 1..) => Some(Event::PeerUp { rank, split }),
            // That a node of another split has left says nothing about ours.
            (before, after) if after >= before || split != cluster => None,
            (_, 0) => Some(Event::PeerDown { rank, role }),
            _ => Some(Event::PeerChanged { rank }),
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
            let publisher =
                self.publishers.get(to).ok_or(TransportError::Unreachable { rank: to })?;
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

/// The address with a port that is free now, or an error that says why there is none.
fn free_address(listen: &str) -> Result<String, LinkError> {
    let error = |source| LinkError::Listen { address: listen.to_owned(), source };
    let (scheme, place) = listen.split_once('/').unwrap_or(("tcp", listen));
    let sockets: Vec<_> = place.to_socket_addrs().map_err(error)?.collect();
    let probe = TcpListener::bind(sockets.as_slice()).map_err(error)?;
    Ok(format!("{scheme}/{}", probe.local_addr().map_err(error)?))
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
    #[error("address \"{found}\", expected {scheme}/HOST:PORT or HOST:PORT")]
    Address {
        /// What was given.
        found: String,
        /// `tls` for those with a key, else `tcp`.
        scheme: &'static str,
    },
    /// Anybody could connect and take part.
    #[error(
        "listen on {address}: without a key only this machine may connect; give --key FILE, or --insecure"
    )]
    Exposed {
        /// Where it was to listen.
        address: String,
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
    #[error("zenoh setting {key}: {reason}")]
    Setting {
        /// Its name.
        key: &'static str,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_is_handed_back_is_never_gone() {
        let split = "ab".repeat(32);
        let mut present = Presence::default();
        let mut heard = |role, session: &str, up| {
            let (split, session) = (split.clone(), session.to_owned());
            let change = Announcement { split: split.clone(), rank: 0, role, session };
            present.change(change, up, &split)
        };
        assert!(matches!(heard(Role::Home, "a", true), Some(Event::PeerUp { rank: 0, .. })));
        let died = heard(Role::Home, "a", false);
        assert!(matches!(died, Some(Event::PeerDown { rank: 0, role: Role::Home })));
        assert!(matches!(heard(Role::Guest, "b", true), Some(Event::PeerUp { rank: 0, .. })));
        assert!(heard(Role::Home, "c", true).is_none());
        assert!(matches!(heard(Role::Guest, "b", false), Some(Event::PeerChanged { rank: 0 })));
    }
}
