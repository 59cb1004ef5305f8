//! All routes, and what every answer goes through: no panic, no unknown path and no wrong method leaves the envelope.

use super::{ApiError, AppState, Code, idempotency, metrics, openapi, whole};
use crate::controllers::{
    agents, audit, counters, device, egress, env, health, keys, metrics as scrape, pages, secrets, snapshots,
    users, vms,
};
use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, patch, post, put};
use std::any::Any;
use tower_http::catch_panic::CatchPanicLayer;

/// The whole API.
pub fn router(state: AppState) -> Router {
    guarded(routes(state.clone()))
        .layer(from_fn_with_state(state.clone(), metrics::observe))
        .with_state(state)
}

/// What every answer goes through, whatever the route does.
fn guarded<S: Clone + Send + Sync + 'static>(routes: Router<S>) -> Router<S> {
    routes.layer(from_fn(common_headers)).layer(CatchPanicLayer::custom(panicked))
}

fn routes(state: AppState) -> Router<AppState> {
    Router::new()
        .route("/healthz", get(health::get))
        .route("/metrics", get(scrape::get))
        .route("/openapi.json", get(openapi::json_document))
        .route("/docs", get(openapi::html_page))
        .route("/v1/users", post(users::create))
        .route("/v1/auth/login", post(users::login))
        .route("/v1/auth/password", put(users::change_password))
        .route("/activate", get(pages::activate).post(pages::activate_check))
        .route("/activate/confirm", post(pages::activate_confirm))
        .route("/verify", get(pages::verify).post(pages::verify_confirm))
        .route("/reset", get(pages::reset).post(pages::reset_send))
        .route("/reset/choose", get(pages::choose).post(pages::choose_set))
        .route("/v1/keys", get(keys::list).post(keys::create))
        .route("/v1/keys/{key_id}", delete(keys::revoke))
        .route("/v1/auth/device/code", post(device::code))
        .route("/v1/auth/device/poll", get(device::poll))
        .route("/v1/vms", get(vms::list).post(vms::create))
        .route("/v1/vms/{vm_id}", get(vms::show).delete(vms::destroy))
        .route("/v1/vms/{vm_id}/start", post(vms::start))
        .route("/v1/vms/{vm_id}/stop", post(vms::stop))
        .route("/v1/vms/{vm_id}/suspend", post(vms::suspend))
        .route("/v1/vms/{vm_id}/ssh", get(vms::ssh))
        .route(
            "/v1/vms/{vm_id}/egress/policy",
            get(egress::vm_policy).put(egress::set_vm_policy).delete(egress::reset_vm_policy),
        )
        .route("/v1/vms/{vm_id}/egress/counters", get(counters::show))
        .route("/v1/vms/{vm_id}/egress/rules", get(egress::vm_rules).post(egress::create_vm_rule))
        .route("/v1/vms/{vm_id}/egress/rules/{rule_id}", delete(egress::delete_vm_rule))
        .route("/v1/vms/{vm_id}/snapshots", get(snapshots::list_of_vm).post(snapshots::create))
        .route("/v1/egress/policy", get(egress::policy).put(egress::set_policy))
        .route("/v1/egress/rules", get(egress::rules).post(egress::create_rule))
        .route("/v1/egress/rules/{rule_id}", delete(egress::delete_rule))
        .route("/v1/audit/egress", get(audit::list))
        .route("/v1/audit/egress/export", get(audit::export))
        .route("/v1/secrets", get(secrets::list).post(secrets::create))
        .route("/v1/secrets/{secret_id}", patch(secrets::update).get(secrets::show).delete(secrets::remove))
        .route("/v1/snapshots", get(snapshots::list))
        .route("/v1/snapshots/{snapshot_id}", get(snapshots::show).delete(snapshots::remove))
        .route("/v1/env", get(env::list))
        .route("/v1/env/{key}", get(env::show).put(env::set).delete(env::remove))
        .route("/v1/agents", get(agents::list).post(agents::create))
        .route("/v1/agents/{agent_id}", get(agents::show).delete(agents::destroy))
        .route("/v1/agents/{agent_id}/log", get(agents::log))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(state, idempotency::layer))
        .layer(from_fn(whole::layer))
}

fn shown(uri: &Uri) -> String {
    uri.path().chars().take(128).collect()
}

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError::new(Code::NotFound, format!("There is nothing at {}", shown(&uri)))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not take {method}; the header `Allow` lists what it takes", shown(&uri));
    ApiError::new(Code::MethodNotAllowed, message)
}

async fn common_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    // Pages have no script, are in no frame, and load nothing.
    let policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn panicked(_: Box<dyn Any + Send>) -> Response {
    // The panic hook has logged where; what was panicked with may hold a request's data.
    ApiError::internal().into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use tower::ServiceExt as _;

    #[tokio::test]
    async fn a_panic_is_an_error_like_any_other_and_tells_nothing() {
        async fn panics() -> Response {
            panic!("with a secret of the request")
        }
        let app: Router = guarded(Router::new().fallback(panics));
        let answer = app.oneshot(axum::http::Request::get("/").body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(answer.status(), 500);
        let body = to_bytes(answer.into_body(), 4096).await.unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["error"]["code"], "internal_error");
        assert!(body["error"]["message"].is_string() && !body.to_string().contains("secret"), "{body}");
    }
}
