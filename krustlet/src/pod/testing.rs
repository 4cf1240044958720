//! An API server for unit tests: one namespace, `shop`, with the objects that a test puts there.

#![allow(clippy::unwrap_used)]

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

#[derive(Clone, Default)]
pub struct Cluster {
    objects: Arc<Mutex<BTreeMap<String, Value>>>,
    reads: Arc<Mutex<u32>>,
    forbidden: u32,
    token_requests: Arc<Mutex<Vec<Value>>>,
    token_seconds: i64,
}

impl Cluster {
    /// One whose tokens live so many seconds.
    pub fn giving_tokens_of(seconds: i64) -> Self {
        Self { token_seconds: seconds, ..Self::default() }
    }

    /// One whose authorizer learns only after so many reads of what the node may read.
    pub fn forbidding(reads: u32) -> Self {
        Self { forbidden: reads, ..Self::default() }
    }

    pub fn put(&self, kind: &str, name: &str, object: Value) {
        self.objects.lock().unwrap().insert(format!("{kind}/{name}"), object);
    }

    /// How many objects were asked for.
    pub fn reads(&self) -> u32 {
        *self.reads.lock().unwrap()
    }

    pub fn token_requests(&self) -> Vec<Value> {
        self.token_requests.lock().unwrap().clone()
    }

    pub fn client(&self) -> kube::Client {
        let app = Router::new()
            .route("/api/v1/namespaces/shop/{kind}/{name}", get(read))
            .route("/api/v1/namespaces/shop/serviceaccounts/{name}/token", post(token))
            .with_state(self.clone());
        kube::Client::new(app, "shop")
    }
}

async fn read(State(cluster): State<Cluster>, Path((kind, name)): Path<(String, String)>) -> (StatusCode, Json<Value>) {
    let reads = {
        let mut reads = cluster.reads.lock().unwrap();
        *reads += 1;
        *reads
    };
    if reads <= cluster.forbidden {
        let status = json!({"kind": "Status", "status": "Failure", "code": 403, "reason": "Forbidden"});
        return (StatusCode::FORBIDDEN, Json(status));
    }
    match cluster.objects.lock().unwrap().get(&format!("{kind}/{name}")) {
        Some(object) => (StatusCode::OK, Json(object.clone())),
        None => {
            let status = json!({"kind": "Status", "status": "Failure", "code": 404, "reason": "NotFound"});
            (StatusCode::NOT_FOUND, Json(status))
        }
    }
}

async fn token(
    State(cluster): State<Cluster>,
    Path(account): Path<String>,
    Json(mut request): Json<Value>,
) -> Json<Value> {
    let mut requests = cluster.token_requests.lock().unwrap();
    request["account"] = json!(account);
    requests.push(request.clone());
    let expires = Timestamp::now() + SignedDuration::from_secs(cluster.token_seconds);
    request["status"] = json!({"token": format!("token-{}", requests.len()), "expirationTimestamp": expires});
    Json(request)
}
