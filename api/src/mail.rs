//! Mails to users: through an SMTP server, or as files in a spool folder where there is none.
//!
//! Nobody waits for a mail: it is sent beside the request, tried a few times, and its loss is logged. A mail's content
//! may hold a ticket: it never goes to the log.

use lettre::message::{Mailbox, Message, header::ContentType};
use lettre::{AsyncSmtpTransport, AsyncTransport as _, Tokio1Executor};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Tries of one mail, with a pause between.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(30);

/// How mails leave.
#[derive(Clone, Default)]
pub enum Via {
    /// They do not.
    #[default]
    Nowhere,
    /// As `.eml` files in this folder, for another program or a person.
    Spool(PathBuf),
    /// By `smtps://user:password@host` or `smtp://host:port?tls=required`.
    Smtp(String),
}

impl std::fmt::Debug for Via {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nowhere => f.write_str("Nowhere"),
            Self::Spool(folder) => f.debug_tuple("Spool").field(folder).finish(),
            // The URL may hold a password.
            Self::Smtp(_) => f.write_str("Smtp(..)"),
        }
    }
}

/// Why mail cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MailError {
    /// The sender's address.
    #[error("`{0}` is not an address to send mail from; write it like tapgate@example.com")]
    From(String),
    /// The server's URL. What was given is not repeated: it may hold a password.
    #[error("the SMTP URL is not valid; write it like smtps://user:password@mail.example.com")]
    Url,
}

enum Way {
    Nowhere,
    Spool(PathBuf),
    Smtp(AsyncSmtpTransport<Tokio1Executor>),
}

/// Sends mails. Clones share the connection.
#[derive(Clone)]
pub struct Mailer(Arc<(Mailbox, Way)>);

impl Mailer {
    /// Sets mail up; the server is not asked yet.
    pub fn new(from: &str, via: Via) -> Result<Self, MailError> {
        let sender = from.parse().map_err(|_| MailError::From(from.to_owned()))?;
        let way = match via {
            Via::Nowhere => Way::Nowhere,
            Via::Spool(folder) => Way::Spool(folder),
            Via::Smtp(url) => {
                let builder =
                    AsyncSmtpTransport::<Tokio1Executor>::from_url(&url).map_err(|_| MailError::Url)?;
                Way::Smtp(builder.timeout(Some(Duration::from_secs(20))).build())
            }
        };
        Ok(Self(Arc::new((sender, way))))
    }

    /// Sends a mail, later.
    pub fn send(&self, to: &str, subject: &str, body: String) {
        let (sender, way) = &*self.0;
        if matches!(way, Way::Nowhere) {
            tracing::debug!("mail.off: a mail was not sent");
            return;
        }
        let message = to.parse().map_err(|error| format!("{error}")).and_then(|to| {
            let message = Message::builder().from(sender.clone()).to(to).subject(subject);
            message.header(ContentType::TEXT_PLAIN).body(body).map_err(|error| error.to_string())
        });
        let message = match message {
            Ok(message) => message,
            Err(error) => return tracing::error!(%error, "mail.unwritable"),
        };
        let parts = self.0.clone();
        tokio::spawn(async move {
            for attempt in 1..=TRIES {
                match deliver(&parts.1, &message).await {
                    Ok(()) => return,
                    Err(error) => tracing::error!(%error, attempt, "mail.failed"),
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
}

async fn deliver(way: &Way, message: &Message) -> Result<(), String> {
    match way {
        Way::Nowhere => Ok(()),
        Way::Smtp(server) => {
            server.send(message.clone()).await.map(|_| ()).map_err(|error| error.to_string())
        }
        Way::Spool(folder) => {
            let (folder, text) = (folder.clone(), message.formatted());
            tokio::task::spawn_blocking(move || write(&folder, &text))
                .await
                .map_err(|error| error.to_string())?
                .map_err(|error| error.to_string())
        }
    }
}

/// Beside first, then in place: who watches the folder sees whole mails.
fn write(folder: &std::path::Path, text: &[u8]) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let now = jiff::Timestamp::now().as_nanosecond();
    let name = format!("{now}-{:08x}", rand::random::<u32>());
    let beside = folder.join(format!(".{name}"));
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(text)?;
    file.sync_all()?;
    std::fs::rename(beside, folder.join(format!("{name}.eml")))
}
