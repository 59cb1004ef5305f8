//! A request that changes something runs to its end once it has begun, even if its client goes away: a record that is written is
//! carried out too. Must never let a change be half made because nobody waits for the answer.

use super::ApiError;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

pub(super) async fn layer(request: Request, next: Next) -> Response {
    if request.method().is_safe() {
        return next.run(request).await;
    }
    // A task of its own is not dropped with the connection.
    tokio::spawn(next.run(request)).await.unwrap_or_else(|_| ApiError::internal().into_response())
}
