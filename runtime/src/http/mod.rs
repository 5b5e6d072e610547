//! HTTP on a node: the Open Inference Protocol, pictures, metrics, and a page to watch.
//!
//! [`Http::bind`] claims an address, [`Http::serve`] answers there, for whatever cluster an [`Asker`]
//! reaches. Inference requests pass a [`Gate`]: some run, some wait, those past that are turned
//! away with 429. Every request ends within its time, or [`OVERDUE`] later; every body, head,
//! connection and picture is bounded by [`Limits`] before it is trusted, and so is what all bodies take
//! together. Who does not read what he has asked for loses his connection. What goes wrong is said as
//! `{"error": "…"}`, in one sentence, with the status that fits; only what is no HTTP at all gets a
//! bare 400. Dropping [`Http`], or what `serve` returns, ends every task.
//!
//! With [`Tls`] it is HTTPS. Either way nobody is asked who he is: whoever reaches the address is
//! answered.

mod asker;
mod budget;
mod classify;
mod gate;
mod impatient;
pub mod oip;
mod relay;
mod routes;
mod status;
mod tls;

use std::error::Error;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use asker::{Asker, ClusterAsker, Own, Unanswered};
pub use classify::Picture;
pub use gate::Gate;
pub use relay::Relay;
pub use tls::{HANDSHAKE_WITHIN, Tls, TlsError};

use self::impatient::Impatient;
use crate::mailbox::MAX_REQUESTS;

/// Requests a node runs at once: enough that one computes while others wait for tensors; more would
/// only make all of them slower.
pub const RUNNING: usize = 8;
/// Requests that wait for their turn: what 64 clients that ask one after another can fill.
pub const QUEUED: usize = 64;
/// How long a request may take, where it does not say itself.
pub const WITHIN: Duration = Duration::from_secs(2);
/// Longest time a request may ask for.
pub const MAX_WITHIN: Duration = Duration::from_secs(60);
/// How long after its time a request has ended, whoever is asked: an answer that comes right after it, or
/// the cluster's own word of why there is none, is worth waiting for; a place for others is worth more.
pub const OVERDUE: Duration = Duration::from_secs(1);
/// How long a body may take to arrive: it holds a place in the queue meanwhile.
pub const BODY_WITHIN: Duration = Duration::from_secs(10);
/// How long a head may take, and how long a connection may stand idle.
pub const HEAD_WITHIN: Duration = Duration::from_secs(30);
/// How long a client may take nothing of an answer: a telephone has changed its network by then; whoever
/// never reads must not keep a connection from others.
pub const WRITE_WITHIN: Duration = Duration::from_secs(20);
/// Largest head, in bytes: a request line and some dozens of fields.
pub const MAX_HEAD: usize = 16 << 10;
/// Largest picture, in bytes: a photograph of a phone.
pub const MAX_PICTURE: usize = 16 << 20;
/// Bodies that are read or held at once, in bytes: four of the largest pictures, or what 64 clients send
/// who ask of a network for photographs; a device of 512 MiB has as much to spare.
pub const MAX_BODIES: usize = 64 << 20;
/// Connections at once; others wait in the system's queue. Every client of the queue, and watchers.
pub const CONNECTIONS: usize = 256;

/// What is read of a connection ahead of being used, in bytes: every connection may have as much.
const BUFFER: usize = 64 << 10;
/// How long connections may take to end when the node does.
const LEAVE_WITHIN: Duration = Duration::from_millis(500);
/// Pause after the system has refused to accept: it is out of descriptors, say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is taken from clients at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that run at once.
    pub running: usize,
    /// Requests that wait for their turn.
    pub queued: usize,
    /// How long a request may take, where it does not say itself.
    pub within: Duration,
    /// How long a body may take to arrive.
    pub body_within: Duration,
    /// How long a head may take to arrive.
    pub head_within: Duration,
    /// How long a client may take nothing of an answer.
    pub write_within: Duration,
    /// Bytes of a picture.
    pub picture: usize,
    /// Bytes of all bodies that are read or held.
    pub bodies: usize,
    /// Connections at once.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            running: RUNNING,
            queued: QUEUED,
            within: WITHIN,
            body_within: BODY_WITHIN,
            head_within: HEAD_WITHIN,
            write_within: WRITE_WITHIN,
            picture: MAX_PICTURE,
            bodies: MAX_BODIES,
            connections: CONNECTIONS,
        }
    }
}

impl Limits {
    /// The limits of one node of `nodes`: requests come in at each of them, and all of them share
    /// what a cluster may have open at once.
    pub fn of_cluster(nodes: usize) -> Limits {
        let share = MAX_REQUESTS / nodes.max(1);
        Limits { running: RUNNING.min(share).max(1), ..Limits::default() }
    }
}

/// An address claimed for HTTP.
#[derive(Debug)]
pub struct Http {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Arc<Tls>>,
}

impl Http {
    /// Claims an address: `PORT`, on this machine only, or `HOST:PORT`. Port 0 takes a free one.
    ///
    /// # Errors
    /// What the system says.
    pub async fn bind(address: &str) -> io::Result<Http> {
        let listener = match address.parse::<u16>() {
            Ok(port) => TcpListener::bind(("127.0.0.1", port)).await?,
            Err(_) => TcpListener::bind(address).await?,
        };
        let address = listener.local_addr()?;
        Ok(Http { listener, address, tls: None })
    }

    /// The same, as HTTPS.
    pub fn encrypted(self, tls: Tls) -> Http {
        Http { tls: Some(Arc::new(tls)), ..self }
    }

    /// The address, with its real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `stop` is cancelled or the future is dropped.
    pub async fn serve(
        self,
        asker: Arc<dyn Asker>,
        picture: Picture,
        limits: Limits,
        stop: CancellationToken,
    ) {
        let places = Arc::new(Semaphore::new(limits.connections));
        let Limits { head_within, write_within, .. } = limits;
        let router = routes::router(asker, picture, limits);
        let mut connections = JoinSet::new();
        while let Some((stream, place)) = self.accept(&places, &stop).await {
            while connections.try_join_next().is_some() {}
            let (router, tls, stop) = (router.clone(), self.tls.clone(), stop.clone());
            connections.spawn(async move {
                let done = match tls {
                    None => {
                        let stream = Impatient::new(stream, write_within);
                        converse(stream, router, head_within, &stop).await
                    }
                    Some(tls) => match cancelled(&stop, tls.accept(stream, write_within)).await {
                        Some(Ok(stream)) => converse(stream, router, head_within, &stop).await,
                        Some(Err(error)) => Err(error.into()),
                        None => Ok(()),
                    },
                };
                if let Err(error) = done {
                    tracing::debug!(%error, "connection ended");
                }
                drop(place);
            });
        }
        let leave = async { while connections.join_next().await.is_some() {} };
        // Who has not left by then is cut off when the set is dropped.
        let _ = tokio::time::timeout(LEAVE_WITHIN, leave).await;
    }

    /// The next connection; `None` at the end.
    async fn accept(
        &self,
        places: &Arc<Semaphore>,
        stop: &CancellationToken,
    ) -> Option<(TcpStream, OwnedSemaphorePermit)> {
        let next = async {
            let place = Arc::clone(places).acquire_owned().await.ok()?;
            loop {
                match self.listener.accept().await {
                    Ok((stream, _)) => {
                        // Answers are written at once, so there is nothing to gather. A connection
                        // that has no such setting works as well.
                        let _ = stream.set_nodelay(true);
                        return Some((stream, place));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "connection not accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        cancelled(stop, next).await.flatten()
    }
}

/// Answers over one connection until its end, or until the request at hand is answered once `stop` is
/// cancelled.
async fn converse(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: Router,
    head_within: Duration,
    stop: &CancellationToken,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(head_within)
        .max_header_size(MAX_HEAD)
        .max_buf_size(BUFFER)
        .half_close(true);
    let service = TowerToHyperService::new(router);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        done = connection.as_mut() => Ok(done?),
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            Ok(connection.await?)
        }
    }
}

async fn cancelled<T>(stop: &CancellationToken, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        () = stop.cancelled() => None,
        done = work => Some(done),
    }
}

/// Why a request is not answered: a status and one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Problem {
    status: StatusCode,
    reason: String,
}

impl Problem {
    fn new(status: StatusCode, reason: impl Into<String>) -> Problem {
        Problem { status, reason: reason.into() }
    }

    fn bad(reason: impl Into<String>) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, reason)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response =
            (self.status, Json(serde_json::json!({ "error": self.reason }))).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            let soon = axum::http::HeaderValue::from_static("1");
            response.headers_mut().insert(axum::http::header::RETRY_AFTER, soon);
        }
        response
    }
}
