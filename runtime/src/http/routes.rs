//! What is asked where, and the way of a request: a place, room, a body, a turn, the cluster.
//!
//! | path | |
//! |---|---|
//! | `GET /v2`, `/v2/health/live`, `/v2/health/ready` | the server |
//! | `GET /v2/models/{name}[/versions/1]`, `…/ready` | the model |
//! | `POST /v2/models/{name}[/versions/1]/infer` | inference |
//! | `POST /classify` | a PNG or JPEG as the body |
//! | `GET /`, `/status`, `/metrics` | to watch |
//!
//! Statuses: 400 the request makes no sense, 404 nothing of that name, 405 another method, 408 the
//! body took too long, 413 it is too large, 415 it is encoded, 429 every place is taken, or the memory
//! for bodies, 503 the cluster cannot answer, 504 it did not in time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{BoxError, Json, Router};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde_json::json;
use tokio::sync::Semaphore;

use super::budget::{Budget, Room};
use super::{
    Asker, Gate, Limits, MAX_WITHIN, OVERDUE, Picture, Problem, Unanswered, classify, oip, status,
};
use crate::client::ClusterInfo;
use crate::watch::metrics::{self, HttpReport};
use crate::{Answer, Tensor, watch};

/// How long whoever describes the model may take.
const MODEL_WITHIN: Duration = Duration::from_secs(2);
/// What is read of a body that nobody wants, so that its sender gets to see why, in bytes.
const MAX_UNWANTED: usize = 1 << 20;
/// How long that may take.
const UNWANTED_WITHIN: Duration = Duration::from_secs(1);
/// Pictures decoded at once: each may take the memory of the largest.
const DECODERS: usize = 1;

/// Everything that requests share.
pub(super) struct App {
    pub(super) asker: Arc<dyn Asker>,
    pub(super) gate: Gate,
    limits: Limits,
    bodies: Budget,
    picture: Picture,
    decoders: Arc<Semaphore>,
    counts: Mutex<Counts>,
    status: status::Cache,
}

#[derive(Debug, Default)]
struct Counts {
    answers: BTreeMap<(&'static str, u16), u64>,
    latency: watch::Histogram,
}

pub(super) fn router(asker: Arc<dyn Asker>, picture: Picture, limits: Limits) -> Router {
    let app = Arc::new(App {
        asker,
        gate: Gate::new(limits.running, limits.queued),
        bodies: Budget::new(limits.bodies),
        limits,
        picture,
        decoders: Arc::new(Semaphore::new(DECODERS)),
        counts: Mutex::default(),
        status: status::Cache::default(),
    });
    Router::new()
        .route("/", get(page))
        .route("/status", get(show_status))
        .route("/metrics", get(show_metrics))
        .route("/classify", post(classify_picture))
        .route("/v2", get(|| async { Json(oip::server()) }))
        .route("/v2/health/live", get(|| async { Json(json!({ "live": true })) }))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{name}", get(model))
        .route("/v2/models/{name}/ready", get(model_ready))
        .route("/v2/models/{name}/infer", post(infer))
        .route("/v2/models/{name}/versions/{version}", get(model))
        .route("/v2/models/{name}/versions/{version}/ready", get(model_ready))
        .route("/v2/models/{name}/versions/{version}/infer", post(infer))
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "nothing is here") })
        .method_not_allowed_fallback(|request: Request| async move {
            let reason = format!("{} is not possible here", request.method());
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, reason)
        })
        .layer(from_fn_with_state(Arc::clone(&app), counted))
        .with_state(app)
}

type Shared = State<Arc<App>>;
type Answered = Result<Response, Problem>;

/// Counts what is answered.
async fn counted(State(app): Shared, request: Request, next: Next) -> Response {
    let endpoint = endpoint(request.uri().path());
    let start = Instant::now();
    let response = next.run(request).await;
    let mut counts = app.counts.lock().unwrap_or_else(PoisonError::into_inner);
    *counts.answers.entry((endpoint, response.status().as_u16())).or_default() += 1;
    if matches!(endpoint, "infer" | "classify") && response.status() == StatusCode::OK {
        counts.latency.add(start.elapsed());
    }
    drop(counts);
    response
}

/// What a path is called in the metrics: few names, whatever clients ask for.
fn endpoint(path: &str) -> &'static str {
    match path {
        "/" => "page",
        "/status" => "status",
        "/metrics" => "metrics",
        "/classify" => "classify",
        _ if path.starts_with("/v2/health") => "health",
        _ if path.starts_with("/v2/models/") && path.ends_with("/infer") => "infer",
        _ if path.starts_with("/v2") => "model",
        _ => "other",
    }
}

async fn page() -> Response {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                  connect-src 'self'; img-src data:";
    let head = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (head, status::PAGE).into_response()
}

async fn show_status(State(app): Shared) -> Response {
    let head = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (head, app.status.get(&app).await).into_response()
}

async fn show_metrics(State(app): Shared) -> Response {
    let own = app.asker.own();
    let http = {
        let counts = app.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let answers = counts.answers.iter().map(|(&(endpoint, code), &n)| (endpoint, code, n));
        HttpReport {
            answers: answers.collect(),
            latency: counts.latency.clone(),
            running: app.gate.running(),
            queued: app.gate.queued(),
        }
    };
    let page = metrics::Page { nodes: app.asker.nodes(), own, http };
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page.text()).into_response()
}

async fn ready(State(app): Shared) -> Response {
    let ready = app.asker.own().missing.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "ready": ready }))).into_response()
}

/// The name in a path, and the version where there is one.
type Named = Path<BTreeMap<String, String>>;

async fn model(State(app): Shared, Path(named): Named) -> Answered {
    Ok(Json(oip::model(&*app.named(&named).await?)).into_response())
}

async fn model_ready(State(app): Shared, Path(named): Named) -> Answered {
    let info = app.named(&named).await?;
    let ready = app.asker.own().missing.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok((status, Json(json!({ "name": oip::model_name(&info), "ready": ready }))).into_response())
}

async fn infer(State(app): Shared, Path(named): Named, head: HeaderMap, body: Body) -> Answered {
    let Some(place) = app.gate.enter() else { return Err(app.turn_away(body).await) };
    let info = match app.named(&named).await {
        Ok(info) => info,
        Err(problem) => return Err(spare(body, problem).await),
    };
    let header = header_length(&head)?;
    let (body, mut room) = app.body(&head, body, oip::largest_body(&info.inputs)).await?;
    let request = oip::read(&body, header, &info).map_err(Problem::bad)?;
    drop(body);
    room.keep(request.inputs.iter().map(|input| size_of_val(input.data())).sum());
    let within = request.within.unwrap_or_else(|| app.within()).min(MAX_WITHIN);
    let deadline = Instant::now() + within;
    let turn = place.turn(deadline).await.ok_or_else(|| app.crowded(within))?;
    let answer = app.ask(request.inputs, within, deadline).await?;
    drop((turn, room));
    let (body, length) = oip::write(&answer, &request.wanted, &info)
        .map_err(|reason| Problem::new(StatusCode::SERVICE_UNAVAILABLE, reason))?;
    let kind = match length {
        Some(_) => "application/octet-stream",
        None => "application/json",
    };
    let mut response = ([(header::CONTENT_TYPE, kind)], body).into_response();
    if let Some(length) = length {
        response.headers_mut().insert(oip::HEADER_LENGTH, HeaderValue::from(length));
    }
    Ok(response)
}

async fn classify_picture(State(app): Shared, head: HeaderMap, body: Body) -> Answered {
    let Some(place) = app.gate.enter() else { return Err(app.turn_away(body).await) };
    let kind = head.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("");
    if kind.starts_with("multipart/") {
        let reason = "the body must be the picture itself, as curl --data-binary @FILE sends it";
        let problem = Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, reason);
        return Err(spare(body, problem).await);
    }
    let info = match app.model().await {
        Ok(info) => info,
        Err(problem) => return Err(spare(body, problem).await),
    };
    let held = app.body(&head, body, app.limits.picture).await?;
    let within = app.within();
    let deadline = Instant::now() + within;
    let turn = place.turn(deadline).await.ok_or_else(|| app.crowded(within))?;
    let inputs = app.decode(held, &info, within, deadline).await?;
    let answer = app.ask(inputs, within, deadline).await?;
    drop(turn);
    Ok(Json(classify::top(&answer, &info)).into_response())
}

impl App {
    /// How long a request may take that does not say itself.
    fn within(&self) -> Duration {
        self.asker.within().unwrap_or(self.limits.within)
    }

    async fn model(&self) -> Result<Arc<ClusterInfo>, Problem> {
        let found = tokio::time::timeout(MODEL_WITHIN + OVERDUE, self.asker.model(MODEL_WITHIN));
        let found = found.await.unwrap_or_else(|_| {
            Err(Unanswered("nobody has described the model in time".to_owned()))
        });
        found.map_err(|error| Problem::new(StatusCode::SERVICE_UNAVAILABLE, error.0))
    }

    /// The model of a name and version.
    async fn named(&self, named: &BTreeMap<String, String>) -> Result<Arc<ClusterInfo>, Problem> {
        let info = self.model().await?;
        let (known, name) = (oip::model_name(&info), named.get("name").map_or("", String::as_str));
        if name != known {
            let reason = format!("unknown model {name:?}, this cluster serves {known:?}");
            return Err(Problem::new(StatusCode::NOT_FOUND, reason));
        }
        match named.get("version").map_or(oip::VERSION, String::as_str) {
            oip::VERSION => Ok(info),
            other => {
                let reason = format!("unknown version {other:?}, the model has {:?}", oip::VERSION);
                Err(Problem::new(StatusCode::NOT_FOUND, reason))
            }
        }
    }

    /// A whole body, within size and time, and the room it takes.
    async fn body(
        &self,
        head: &HeaderMap,
        body: Body,
        limit: usize,
    ) -> Result<(Bytes, Room), Problem> {
        if let Some(encoding) = head.get(header::CONTENT_ENCODING).filter(|e| *e != "identity") {
            let reason = format!("content encoding {encoding:?} is not supported");
            let problem = Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, reason);
            return Err(spare(body, problem).await);
        }
        let too_large = || {
            let reason = format!("the body has more than {limit} bytes");
            Problem::new(StatusCode::PAYLOAD_TOO_LARGE, reason)
        };
        let announced = body.size_hint().exact();
        if announced.is_some_and(|bytes| bytes > limit as u64) {
            return Err(spare(body, too_large()).await);
        }
        let announced = announced.map(|bytes| bytes as usize);
        let Some(room) = self.room(announced.unwrap_or(limit)).await else {
            let within = self.within().as_secs_f64();
            let reason = format!("there was no memory for the body within {within} s");
            return Err(spare(body, Problem::new(StatusCode::TOO_MANY_REQUESTS, reason)).await);
        };
        let within = self.limits.body_within;
        match tokio::time::timeout(within, whole(body, limit, announced)).await {
            Ok(Ok(body)) => Ok((body, room)),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(error)) => {
                let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                Err(Problem::bad(format!("the body ends early: {cause}")))
            }
            Err(_) => {
                let reason = format!("the body took longer than {} s", within.as_secs_f64());
                Err(Problem::new(StatusCode::REQUEST_TIMEOUT, reason))
            }
        }
    }

    /// Room for a body, within the time of a request.
    async fn room(&self, bytes: usize) -> Option<Room> {
        self.bodies.take(bytes, Instant::now() + self.within()).await
    }

    /// The model's inputs from a picture, whose room is given back once it is decoded, or was thrown out.
    async fn decode(
        &self,
        (body, room): (Bytes, Room),
        info: &Arc<ClusterInfo>,
        within: Duration,
        deadline: Instant,
    ) -> Result<Vec<Tensor>, Problem> {
        let (picture, info) = (Arc::clone(&self.picture), Arc::clone(info));
        let turn = Arc::clone(&self.decoders).acquire_owned();
        let turn = tokio::time::timeout_at(deadline.into(), turn).await;
        let turn = turn.map_err(|_| self.crowded(within))?;
        let decoding = tokio::task::spawn_blocking(move || {
            let inputs = picture(&body, &info);
            // Not before: a decoder that nobody waits for any more still takes its memory.
            drop((body, room, turn));
            inputs
        });
        match tokio::time::timeout_at(deadline.into(), decoding).await {
            Ok(Ok(inputs)) => inputs.map_err(Problem::bad),
            // A panic within the decoder: the picture is at fault, and nothing else is harmed.
            Ok(Err(_)) => Err(Problem::bad("the picture cannot be decoded")),
            Err(_) => {
                let reason =
                    format!("the picture was not decoded within {} s", within.as_secs_f64());
                Err(Problem::new(StatusCode::GATEWAY_TIMEOUT, reason))
            }
        }
    }

    /// The cluster's answer; ends [`OVERDUE`] after the deadline, whatever the asker does.
    async fn ask(
        &self,
        inputs: Vec<Tensor>,
        within: Duration,
        deadline: Instant,
    ) -> Result<Answer, Problem> {
        let left = deadline.saturating_duration_since(Instant::now());
        let asked = tokio::time::timeout(left + OVERDUE, self.asker.infer(inputs, left));
        let answer =
            asked.await.unwrap_or_else(|_| Err(Unanswered("no answer in time".to_owned())));
        answer.map_err(|unanswered| {
            let late = Instant::now() >= deadline && self.asker.own().missing.is_empty();
            match late {
                true => {
                    let reason = format!("{} (within {} s)", unanswered.0, within.as_secs_f64());
                    Problem::new(StatusCode::GATEWAY_TIMEOUT, reason)
                }
                false => Problem::new(StatusCode::SERVICE_UNAVAILABLE, unanswered.0),
            }
        })
    }

    async fn turn_away(&self, body: Body) -> Problem {
        let reason = format!("all {} places for requests are taken", self.gate.places());
        spare(body, Problem::new(StatusCode::TOO_MANY_REQUESTS, reason)).await
    }

    fn crowded(&self, within: Duration) -> Problem {
        let reason = format!("it was not the request's turn within {} s", within.as_secs_f64());
        Problem::new(StatusCode::GATEWAY_TIMEOUT, reason)
    }
}

/// Reads a body of at most `limit` bytes into one piece.
async fn whole(body: Body, limit: usize, announced: Option<usize>) -> Result<Bytes, BoxError> {
    let mut body = Limited::new(body, limit);
    let mut bytes: Vec<u8> = Vec::with_capacity(announced.unwrap_or(0));
    while let Some(frame) = body.frame().await {
        // What is no data is of no interest.
        if let Ok(data) = frame?.into_data() {
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes.into())
}

/// Reads on for a moment without keeping anything: a connection that is closed on a client that
/// still writes may take the answer with it.
async fn spare(body: Body, problem: Problem) -> Problem {
    let mut body = Limited::new(body, MAX_UNWANTED);
    let read = async { while matches!(body.frame().await, Some(Ok(_))) {} };
    // Whoever sends more than that, or more slowly, may miss the reason.
    let _ = tokio::time::timeout(UNWANTED_WITHIN, read).await;
    problem
}

fn header_length(head: &HeaderMap) -> Result<Option<usize>, Problem> {
    let Some(value) = head.get(oip::HEADER_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    match length {
        Some(length) => Ok(Some(length)),
        None => Err(Problem::bad(format!("{} is no number of bytes", oip::HEADER_LENGTH))),
    }
}
