//! The HTTP side: state, routes, the error envelope, and what requests are taken apart with.

mod auth;
mod codes;
mod error;
mod fields;
pub(crate) mod form;
mod idempotency;
mod ids;
mod limits;
pub mod metrics;
pub mod openapi;
mod params;
mod password;
mod router;
pub mod server;
mod state;
mod version;
mod view;

pub(crate) use crate::controllers::users::{check_email, check_password};
pub use auth::Account;
pub(crate) use auth::bearer;
pub use codes::Code;
pub use error::ApiError;
pub(crate) use error::refused;
pub use fields::Fields;
pub(crate) use fields::{at_most as fields_at_most, bounded as fields_bounded};
pub use ids::{Id, Key};
pub use limits::{Peer, Rate, Rates};
pub(crate) use openapi::escape;
pub use params::Params;
pub(crate) use params::invalid as params_invalid;
pub(crate) use password::{hash_password, verify_password};
pub use router::router;
pub use state::{AppState, CaMaker, MAX_RESOURCES, Quotas, Settings, SignUp};
pub use version::{IfMatch, Versioned};
pub use view::{List, exact_time, time};
