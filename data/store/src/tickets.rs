//! Tickets: short texts that only we can have made, for links in mails and fields of forms. Nothing is stored.
//!
//! A ticket is bound to a purpose and ends at a time. What must work only once has to carry something that its use
//! changes.

use crate::seal::SealKey;
use crate::store::Store;
use crate::time::now_us;
use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

const TAG: usize = 32;
const TIME: usize = 8;

#[derive(Clone)]
pub(crate) struct Tickets(hmac::Key);

impl Tickets {
    pub(crate) fn new(key: &SealKey) -> Self {
        Self(key.derive("ticket"))
    }

    fn tag(&self, purpose: &str, body: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(purpose.as_bytes());
        context.update(&[0]);
        context.update(body);
        context.sign()
    }
}

impl Store {
    /// A ticket with this content, good until a time.
    pub fn ticket(&self, purpose: &str, content: &str, expires_us: i64) -> String {
        let body = [&expires_us.to_be_bytes()[..], content.as_bytes()].concat();
        let tag = self.tickets.tag(purpose, &body);
        URL_SAFE_NO_PAD.encode([tag.as_ref(), &body].concat())
    }

    /// The content of a ticket that we made for this purpose and that is still good.
    pub fn redeem(&self, purpose: &str, ticket: &str) -> Option<String> {
        if ticket.len() > 4096 {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(ticket).ok()?;
        let (tag, body) = bytes.split_at_checked(TAG)?;
        let own = self.tickets.tag(purpose, body);
        aws_lc_rs::constant_time::verify_slices_are_equal(tag, own.as_ref()).ok()?;
        let (time, content) = body.split_first_chunk::<TIME>()?;
        if i64::from_be_bytes(*time) < now_us() {
            return None;
        }
        String::from_utf8(content.to_vec()).ok()
    }
}
