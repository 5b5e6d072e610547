//! The page that shows a cluster live, and what it polls.
//!
//! Takes what an [`Asker`](super::Asker) tells; gives `/status`: counts that only grow, from which the
//! page makes rates. The nodes are asked at most every [`FRESH`], however many pages look.

use std::time::{Duration, Instant};

use axum::body::Bytes;
use serde_json::json;
use tokio::sync::Mutex;

use super::routes::App;
use crate::watch::BOUNDS_MS;

/// The page: markup, style and script in one, nothing from elsewhere.
pub(super) const PAGE: &str = include_str!("page.html");
/// How long a status is shown to others as it is.
const FRESH: Duration = Duration::from_millis(500);
/// How long the model's description may take: the page shows the nodes without it.
const MODEL_WITHIN: Duration = Duration::from_millis(300);

/// How long all of it may take, whoever is asked: others wait for the same status.
const TOLD_WITHIN: Duration = Duration::from_secs(2);

/// The last status, and when it was made.
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<Option<(Instant, Bytes)>>);

impl Cache {
    /// The status, made now or a moment ago.
    pub(super) async fn get(&self, app: &App) -> Bytes {
        // Whoever comes meanwhile waits for the same answer.
        let mut last = self.0.lock().await;
        if let Some((made, status)) = &*last
            && made.elapsed() < FRESH
        {
            return status.clone();
        }
        let status = Bytes::from(status(app).await.to_string());
        *last = Some((Instant::now(), status.clone()));
        status
    }
}

async fn status(app: &App) -> serde_json::Value {
    let told = async { tokio::join!(app.asker.model(MODEL_WITHIN), app.asker.reports()) };
    let (model, reports) = match tokio::time::timeout(TOLD_WITHIN, told).await {
        Ok((model, reports)) => (model.ok(), reports),
        Err(_) => (None, Vec::new()),
    };
    let model = model.map(|info| {
        json!({ "name": super::oip::model_name(&info), "split": info.split, "nodes": info.nodes })
    });
    let own = app.asker.own();
    json!({
        "model": model,
        "nodes": app.asker.nodes(),
        "ranks": own.reports.iter().map(|report| report.rank).collect::<Vec<_>>(),
        "missing": own.missing,
        "reports": reports,
        "bounds_ms": BOUNDS_MS,
        "http": {
            "running": app.gate.running(),
            "queued": app.gate.queued(),
            "places": app.gate.places(),
        },
        "events": own.events,
        "takeovers": own.takeovers,
    })
}
