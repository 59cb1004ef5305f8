//! Sign-up, and logging in by password.

use super::keys::KeyView;
use crate::http::{
    Account, ApiError, AppState, Code, Fields, Params, Peer, SignUp, hash_password, time, verify_password,
};
use crate::http::{fields_at_most as at_most, fields_bounded as bounded};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tapgate_model::HostName;
use tapgate_store::{NewUser, UserRecord, now_us};
use zeroize::Zeroizing;

/// How long a link that confirms an address works (microseconds).
const VERIFY_WITHIN: i64 = 3 * 86_400_000_000;

#[derive(Serialize)]
pub(crate) struct UserView {
    id: String,
    first_name: String,
    last_name: String,
    email: String,
    email_verified: bool,
    created_at: String,
}

impl From<UserRecord> for UserView {
    fn from(user: UserRecord) -> Self {
        Self {
            id: user.id.into(),
            first_name: user.first_name,
            last_name: user.last_name,
            email: user.email,
            email_verified: user.email_verified,
            created_at: time(user.created_at),
        }
    }
}

#[derive(Serialize)]
pub(crate) struct SignedUp {
    api_key: KeyView,
    user: UserView,
}

pub(crate) async fn create(
    State(state): State<AppState>,
    peer: Peer,
    params: Params,
    mut fields: Fields,
) -> Result<(StatusCode, Json<SignedUp>), ApiError> {
    params.finish()?;
    let first_name = fields.text("first_name")?;
    let last_name = fields.text("last_name")?;
    let email = fields.text("email")?;
    let password = Zeroizing::new(fields.text("password")?);
    let invitation = fields.optional_text("invitation")?;
    fields.finish()?;
    bounded("first_name", &first_name, 100, false)?;
    bounded("last_name", &last_name, 100, false)?;
    check_email(&email)?;
    check_password(&password)?;
    state.limits().password.take(&peer)?;
    may_sign_up(&state, &email, invitation.as_deref())?;
    let password = hash_password(password).await?;
    let new = NewUser { first_name, last_name, email, password };
    let (user, key) = state.store().user_create(new, "CLI").await?;
    send_verification(&state, &user);
    Ok((StatusCode::CREATED, Json(SignedUp { api_key: key.into(), user: user.into() })))
}

/// Whether this host takes new accounts at all, and this one.
fn may_sign_up(state: &AppState, email: &str, invitation: Option<&str>) -> Result<(), ApiError> {
    let refused = |message| Err(ApiError::new(Code::SignupClosed, message));
    match state.settings().sign_up {
        SignUp::Open => Ok(()),
        SignUp::Closed => refused("Sign-up is closed here; ask the operator for an account"),
        SignUp::Invitation => {
            let invited = invitation.and_then(|ticket| state.store().redeem("invite", ticket));
            match invited.is_some_and(|invited| invited == email.trim().to_lowercase()) {
                true => Ok(()),
                false => {
                    refused("Sign-up is by invitation here; send the operator's invitation as `invitation`")
                }
            }
        }
    }
}

/// Mails the link that confirms the address.
fn send_verification(state: &AppState, user: &UserRecord) {
    let url = &state.settings().public_url;
    let ticket = state.store().ticket("verify", user.id.as_str(), now_us() + VERIFY_WITHIN);
    let body = format!(
        "Somebody, hopefully you, made an account with this address at {url}.\n\n\
         To confirm the address, open within three days:\n\n{url}/verify?ticket={ticket}\n\n\
         If it was not you, there is nothing to do.\n"
    );
    state.mailer().send(&user.email, "Confirm your address for tapgate", body);
}

/// A short name for a password hash, which says nothing about it and changes with it.
pub(super) fn fingerprint(hash: &str) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(hash.as_bytes()).iter().take(12).map(|byte| format!("{byte:02x}")).collect()
}

/// Changes the password. The key alone is not enough: it may have been found lying around.
pub(crate) async fn change_password(
    State(state): State<AppState>,
    account: Account,
    peer: Peer,
    params: Params,
    mut fields: Fields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    let current = Zeroizing::new(fields.text("current_password")?);
    let new = Zeroizing::new(fields.text("new_password")?);
    fields.finish()?;
    at_most("current_password", &current, 1024, true)?;
    check_password(&new)?;
    state.limits().password.take(&peer)?;
    let email = state.store().user(&account.user).await?.email;
    let before = state.store().user_by_email(&email).await?.map(|(_, hash)| hash).unwrap_or_default();
    let wrong = || ApiError::new(Code::PasswordWrong, "`current_password` is wrong");
    if !verify_password(current, Some(before.clone())).await? {
        return Err(wrong());
    }
    // It may have been changed while this was being checked.
    match state.store().user_set_password(&account.user, &before, hash_password(new).await?).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(wrong()),
    }
}

/// Another key for an account, by its password. An extension of the contract, whose only other way is a device code.
pub(crate) async fn login(
    State(state): State<AppState>,
    peer: Peer,
    params: Params,
    mut fields: Fields,
) -> Result<(StatusCode, Json<SignedUp>), ApiError> {
    params.finish()?;
    let email = fields.text("email")?;
    let password = Zeroizing::new(fields.text("password")?);
    let name = fields.optional_text("name")?.unwrap_or_else(|| "CLI".into());
    fields.finish()?;
    bounded("name", &name, 64, false)?;
    at_most("password", &password, 1024, true)?;
    state.limits().password.take(&peer)?;
    let found = state.store().user_by_email(&email).await?;
    let (user, hash) = found.unzip();
    let right = verify_password(password, hash).await?;
    match user {
        Some(user) if right && !user.disabled => {
            let key = state.store().key_create(&user.id, &name, state.settings().quotas.keys).await?;
            Ok((StatusCode::CREATED, Json(SignedUp { api_key: key.into(), user: user.into() })))
        }
        _ => Err(ApiError::unauthorized("The email or the password is wrong")),
    }
}

/// An address as mail servers take it: no quoting, no comments, a domain with at least two labels.
pub(crate) fn check_email(email: &str) -> Result<(), ApiError> {
    let wrong = || ApiError::validation("`email` must be an address like alice@example.com");
    let (local, domain) = email.rsplit_once('@').ok_or_else(wrong)?;
    let plain = |c: char| {
        !c.is_whitespace()
            && !c.is_control()
            && !matches!(c, '@' | '"' | '(' | ')' | '<' | '>' | ',' | ';' | ':' | '\\')
    };
    let good = !local.is_empty() && local.len() <= 64 && email.len() <= 254 && local.chars().all(plain);
    let domain = HostName::parse(domain).map_err(|_| wrong())?;
    if good && domain.parent().is_some() { Ok(()) } else { Err(wrong()) }
}

pub(crate) fn check_password(password: &str) -> Result<(), ApiError> {
    if password.chars().count() < 8 {
        return Err(ApiError::validation("`password` must be at least 8 characters long"));
    }
    at_most("password", password, 1024, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_for_form() {
        for good in ["alice@example.com", "a.b+c@sub.example.org", "x@b\u{fc}cher.example"] {
            assert!(check_email(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "a",
            "@example.com",
            "a@",
            "a@localhost",
            "a b@example.com",
            "a@b@example.com",
            "a@[192.0.2.1]",
            "a@192.0.2.1",
            "a@example.com\r\nBcc: b@example.com",
        ] {
            assert!(check_email(bad).is_err(), "{bad}");
        }
    }
}
