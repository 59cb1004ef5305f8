//! The pages behind links: confirming a device code, confirming an address, a new password. No script, no session:
//! who confirms something shows the password or a ticket from a mail.

use super::users::{check_password, fingerprint};
use crate::http::form::{Form, NoParams, Ticket, Visitor, failed, input, message};
use crate::http::{ApiError, AppState, Code, Peer, escape, hash_password, verify_password};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use tapgate_model::UserId;
use tapgate_store::{StoreError, now_us};
use zeroize::Zeroizing;

/// Between the two steps of confirming a code (microseconds).
const CONFIRM_WITHIN: i64 = 300_000_000;
/// How long a link to a new password works (microseconds).
const RESET_WITHIN: i64 = 3_600_000_000;

fn code_form(visitor: Visitor, state: &AppState) -> Response {
    let fields = [
        input("code", "text", "Code shown by the program", "autocomplete=off autofocus maxlength=16"),
        input("email", "email", "Email", "autocomplete=username maxlength=254"),
        input("password", "password", "Password", "autocomplete=current-password maxlength=1024"),
        "<p><a href=\"/reset\">Forgot the password?</a></p>".to_owned(),
    ];
    visitor.form(state, "Log a program in", "/activate", &fields.concat(), "Continue")
}

pub(crate) async fn activate(State(state): State<AppState>, _: NoParams, visitor: Visitor) -> Response {
    code_form(visitor, &state)
}

/// First step: code and password. The answer says who asks, and wants a yes.
pub(crate) async fn activate_check(
    State(state): State<AppState>,
    peer: Peer,
    visitor: Visitor,
    _: NoParams,
    form: Form,
) -> Response {
    if let Some(refused) = visitor.refusal(&state, &form) {
        return refused;
    }
    match who(&state, &peer, &form).await {
        Err(error) => failed(&error, "/activate"),
        Ok((user, requester)) => {
            let content = format!("{user} {}", form.field("code"));
            let ticket = state.store().ticket("activate", &content, now_us() + CONFIRM_WITHIN);
            let fields = format!(
                "<p>A program at <strong>{}</strong> asks for a key to your account. Go on only if you started it \
                 yourself, just now.</p><input type=hidden name=ticket value=\"{ticket}\">",
                escape(&requester)
            );
            visitor.form(&state, "Is this you?", "/activate/confirm", &fields, "Give it a key")
        }
    }
}

async fn who(state: &AppState, peer: &Peer, form: &Form) -> Result<(UserId, String), ApiError> {
    state.limits().password.take(peer)?;
    let password = Zeroizing::new(form.field("password").to_owned());
    let (user, hash) = state.store().user_by_email(form.field("email")).await?.unzip();
    let right = password.len() <= 4096 && verify_password(password, hash).await?;
    let user = user.filter(|user| right && !user.disabled);
    let user = user.ok_or_else(|| ApiError::unauthorized("The email or the password is wrong."))?;
    // Only who has an account can try codes, and only so often.
    let requester = state.store().device_pending(form.field("code")).await?;
    let gone = || {
        ApiError::new(Code::CodeNotFound, "The code is wrong or has expired. Ask the program for a new one.")
    };
    Ok((user.id, requester.ok_or_else(gone)?))
}

/// Second step: the yes.
pub(crate) async fn activate_confirm(
    State(state): State<AppState>,
    visitor: Visitor,
    _: NoParams,
    form: Form,
) -> Response {
    if let Some(refused) = visitor.refusal(&state, &form) {
        return refused;
    }
    let content = state.store().redeem("activate", form.field("ticket"));
    let parts = content.as_deref().and_then(|content| content.split_once(' '));
    let confirmed = match parts.and_then(|(user, code)| Some((user.parse().ok()?, code))) {
        Some((user, code)) => {
            state.store().device_confirm(code, &user, state.settings().quotas.keys).await.map(|_| true)
        }
        None => Ok(false),
    };
    match confirmed {
        Ok(true) => message(StatusCode::OK, "Done", "The program is logged in. You can close this page."),
        Err(error) if !matches!(error, StoreError::NotFound(_)) => failed(&error.into(), "/activate"),
        _ => {
            let what = "The code has expired or was used. Ask the program for a new one.";
            message(StatusCode::NOT_FOUND, "That did not work", what)
        }
    }
}

/// The link of a mail asks before it acts: programs open links to look at them.
pub(crate) async fn verify(
    State(state): State<AppState>,
    visitor: Visitor,
    Ticket(ticket): Ticket,
) -> Response {
    let fields = format!("<input type=hidden name=ticket value=\"{}\">", escape(&ticket));
    visitor.form(&state, "Confirm your address", "/verify", &fields, "Confirm")
}

pub(crate) async fn verify_confirm(
    State(state): State<AppState>,
    visitor: Visitor,
    _: NoParams,
    form: Form,
) -> Response {
    if let Some(refused) = visitor.refusal(&state, &form) {
        return refused;
    }
    let user = state.store().redeem("verify", form.field("ticket")).and_then(|user| user.parse().ok());
    let Some(user) = user else {
        return message(
            StatusCode::NOT_FOUND,
            "That did not work",
            "The link has expired or is not whole. Open the newest mail's, as one piece.",
        );
    };
    match state.store().user_verified(&user).await {
        Ok(()) => message(StatusCode::OK, "Done", "Your address is confirmed."),
        Err(error) => failed(&error.into(), &format!("/verify?ticket={}", form.field("ticket"))),
    }
}

pub(crate) async fn reset(State(state): State<AppState>, _: NoParams, visitor: Visitor) -> Response {
    let fields = input("email", "email", "Email", "autocomplete=username maxlength=254 autofocus");
    visitor.form(&state, "A new password", "/reset", &fields, "Send me a link")
}

/// The same answer whether there is such an account or not, and whether it is sent a mail.
pub(crate) async fn reset_send(
    State(state): State<AppState>,
    peer: Peer,
    visitor: Visitor,
    _: NoParams,
    form: Form,
) -> Response {
    if let Some(refused) = visitor.refusal(&state, &form) {
        return refused;
    }
    if let Err(error) = state.limits().password.take(&peer) {
        return failed(&error, "/reset");
    }
    match state.store().user_by_email(form.field("email")).await {
        Err(error) => return failed(&error.into(), "/reset"),
        Ok(None) => {}
        // It was sent enough of them, by whoever asked. Nobody is told: the newest still works.
        Ok(Some((user, _))) if state.limits().mail.take(&user.id).is_err() => {
            tracing::info!(user = %user.id, "mail.too_many_links");
        }
        Ok(Some((user, hash))) => {
            let content = format!("{} {}", fingerprint(&hash), user.email);
            let ticket = state.store().ticket("reset", &content, now_us() + RESET_WITHIN);
            let url = &state.settings().public_url;
            let body = format!(
                "Somebody, hopefully you, asked for a new password for this address at {url}.\n\n\
                 To choose one, open within an hour:\n\n{url}/reset/choose?ticket={ticket}\n\n\
                 If it was not you, there is nothing to do.\n"
            );
            state.mailer().send(&user.email, "A new password for tapgate", body);
        }
    }
    message(
        StatusCode::OK,
        "Look into your mail",
        "If there is an account with this address, a link is on its way.",
    )
}

pub(crate) async fn choose(
    State(state): State<AppState>,
    visitor: Visitor,
    Ticket(ticket): Ticket,
) -> Response {
    let fields = [
        format!("<input type=hidden name=ticket value=\"{}\">", escape(&ticket)),
        input("password", "password", "New password", "autocomplete=new-password minlength=8 maxlength=1024"),
    ];
    visitor.form(&state, "A new password", "/reset/choose", &fields.concat(), "Set it")
}

pub(crate) async fn choose_set(
    State(state): State<AppState>,
    peer: Peer,
    visitor: Visitor,
    _: NoParams,
    form: Form,
) -> Response {
    if let Some(refused) = visitor.refusal(&state, &form) {
        return refused;
    }
    match set_password(&state, &peer, &form).await {
        Ok(false) => message(
            StatusCode::OK,
            "Done",
            "The new password holds from now on. Your API keys work as before.",
        ),
        Ok(true) => message(
            StatusCode::OK,
            "Done",
            "The new password holds from now on, and your address is confirmed. API keys from before, which anybody \
             may have made with this address, no longer work: log in for a new one.",
        ),
        Err(error) => failed(&error, "/reset"),
    }
}

/// Answers whether keys were revoked with it.
async fn set_password(state: &AppState, peer: &Peer, form: &Form) -> Result<bool, ApiError> {
    state.limits().password.take(peer)?;
    let gone = || ApiError::new(Code::LinkNotFound, "The link has expired or was used. Ask for a new one.");
    let content = state.store().redeem("reset", form.field("ticket")).ok_or_else(gone)?;
    let (print, email) = content.split_once(' ').ok_or_else(gone)?;
    let (user, before) = state.store().user_by_email(email).await?.ok_or_else(gone)?;
    // Once it was used the password is another, and the link fits no more.
    if fingerprint(&before) != print {
        return Err(gone());
    }
    let password = Zeroizing::new(form.field("password").to_owned());
    check_password(&password)?;
    let hash = hash_password(password).await?;
    state.store().user_reset_password(&user.id, &before, hash).await?.ok_or_else(gone)
}
