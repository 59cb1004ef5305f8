//! One question, decided and answered.
//!
//! In `enforce` a name that no rule allows is never sent anywhere, so that DNS carries nothing out. Must never hand out
//! an address that the dialer would refuse.

use crate::{audit::Record, proxy::Shared, table::VmEntry};
use hickory_resolver::{
    lookup::Lookup,
    net::{DnsError, NetError, NoRecords},
    proto::{
        op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
        rr::{DNSClass, RData, Record as Rr, RecordType, rdata::opt::EdnsOption},
    },
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tapgate_model::{EventId, HostName, Note, Protocol, Reason, Verdict, VmPolicy};

/// The largest datagram that passes everywhere unfragmented (the DNS flag day's figure).
const MAX_UDP: u16 = 1232;
/// Longest TTL handed out: a pin outlives it.
const MAX_TTL: u32 = 1800;
/// The option code of extended errors (RFC 8914).
const EXTENDED_ERROR: u16 = 15;

/// Info codes of extended errors.
#[derive(Clone, Copy)]
enum Info {
    Blocked = 15,
    Filtered = 17,
    NotSupported = 21,
    NetworkError = 23,
}

/// How the question came.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// Which guest asked whom.
pub(crate) struct Asker<'a> {
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) entry: &'a Arc<VmEntry>,
    /// The address that was asked.
    pub(crate) to: SocketAddr,
}

/// What is said.
struct Answer {
    code: ResponseCode,
    records: Vec<Rr>,
    authority: Vec<Rr>,
    extended: Option<(Info, String)>,
}

impl Answer {
    fn code(code: ResponseCode) -> Self {
        Self { code, records: Vec::new(), authority: Vec::new(), extended: None }
    }

    fn because(self, info: Info, text: String) -> Self {
        Self { extended: Some((info, text)), ..self }
    }
}

/// Answers a message; nothing is said to what is no question.
async fn answer(asker: Asker<'_>, message: &[u8], transport: Transport) -> Option<Vec<u8>> {
    let started = Instant::now();
    let policy = asker.entry.policy.load_full();
    let request = match Message::from_vec(message) {
        Ok(request) if request.metadata.message_type == MessageType::Query => request,
        Ok(_) => {
            asker.malformed();
            return None;
        }
        Err(_) => {
            asker.malformed();
            return form_error(message);
        }
    };
    let answer = asker.decide(&policy, &request, started).await;
    encode(&request, answer, transport)
}

/// Refuses whatever is a question: the parts of an answer that need no resolver.
pub fn refuse_question(message: &[u8]) -> Option<Vec<u8>> {
    let request = match Message::from_vec(message) {
        Ok(request) if request.metadata.message_type == MessageType::Query => request,
        Ok(_) => return None,
        Err(_) => return form_error(message),
    };
    let name = request.queries.first().map(|query| HostName::parse_wire(query.name().to_ascii().as_bytes()));
    let text = format!("not allowed: {name:?}");
    let answer = Answer::code(ResponseCode::Refused).because(Info::Blocked, text);
    encode(&request, answer, Transport::Udp)
}

/// Answers, or says that the VM asks too much at a time.
pub(crate) async fn answer_within_bounds(
    asker: Asker<'_>,
    message: &[u8],
    transport: Transport,
) -> Option<Vec<u8>> {
    match asker.entry.dns.try_acquire() {
        Ok(_permit) => answer(asker, message, transport).await,
        Err(_) => busy(&asker, message),
    }
}

fn busy(asker: &Asker<'_>, message: &[u8]) -> Option<Vec<u8>> {
    asker.limited(1);
    let request = Message::from_vec(message).ok()?;
    (request.metadata.message_type == MessageType::Query).then_some(())?;
    encode(&request, Answer::code(ResponseCode::ServFail), Transport::Udp)
}

fn form_error(message: &[u8]) -> Option<Vec<u8>> {
    // Only with a whole header that says "question" is there an id to answer to.
    let (id, flags) = (message.get(..2)?, *message.get(2)?);
    if message.len() < 12 || flags & 0x80 != 0 {
        return None;
    }
    Message::error_msg(u16::from_be_bytes([id[0], id[1]]), OpCode::Query, ResponseCode::FormErr).to_vec().ok()
}

impl Asker<'_> {
    fn record(
        &self,
        policy: &VmPolicy,
        verdict: Verdict,
        host: Option<&HostName>,
        started: Instant,
    ) -> Record {
        let mut record =
            Record::begin(&self.shared.sink, Note::default(), policy, Protocol::Dns, verdict, started);
        record.destination(host, self.to.ip(), self.to.port());
        record
    }

    /// Records what is no question.
    pub(crate) fn malformed(&self) {
        let policy = self.entry.policy.load_full();
        drop(self.record(&policy, Verdict::Deny { reason: Reason::Malformed }, None, Instant::now()));
    }

    /// Records that the VM was refused so many times at one of its limits.
    pub(crate) fn limited(&self, count: u32) {
        let policy = self.entry.policy.load_full();
        self.record(&policy, Verdict::Deny { reason: Reason::Limit }, None, Instant::now()).count(count);
    }

    /// Records a refusal and gives its id.
    fn refuse(
        &self,
        policy: &VmPolicy,
        reason: Reason,
        host: Option<&HostName>,
        started: Instant,
    ) -> EventId {
        self.record(policy, Verdict::Deny { reason }, host, started).id()
    }

    async fn decide(&self, policy: &VmPolicy, request: &Message, started: Instant) -> Answer {
        if request.metadata.op_code != OpCode::Query {
            self.refuse(policy, Reason::DnsQuestion, None, started);
            return Answer::code(ResponseCode::NotImp);
        }
        if request.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
            let name = request.queries.first().map(|query| query.name().to_ascii());
            let name = name.and_then(|name| HostName::parse_wire(name.as_bytes()).ok());
            self.refuse(policy, Reason::DnsQuestion, name.as_ref(), started);
            return Answer::code(ResponseCode::BADVERS);
        }
        let [query] = request.queries.as_slice() else {
            self.refuse(policy, Reason::DnsQuestion, None, started);
            return Answer::code(ResponseCode::FormErr);
        };
        let Ok(name) = HostName::parse_wire(query.name().to_ascii().as_bytes()) else {
            let event = self.refuse(policy, Reason::BadName, None, started);
            let text = format!("not a host name (event {event})");
            return Answer::code(ResponseCode::Refused).because(Info::Blocked, text);
        };
        if query.query_class() != DNSClass::IN || !answered(query.query_type()) {
            let event = self.refuse(policy, Reason::DnsQuestion, Some(&name), started);
            let text = format!("questions of this type are not answered (event {event})");
            return Answer::code(ResponseCode::Refused).because(Info::NotSupported, text);
        }
        match policy.decide_host(&name) {
            Verdict::Deny { reason } => {
                let event = self.refuse(policy, reason, Some(&name), started);
                let text = format!("no egress rule of this VM allows {name} (event {event})");
                return Answer::code(ResponseCode::Refused).because(Info::Blocked, text);
            }
            verdict @ Verdict::Tolerate { .. } => drop(self.record(policy, verdict, Some(&name), started)),
            Verdict::Allow { .. } => {}
        }
        self.resolve(policy, query, &name, started).await
    }

    async fn resolve(&self, policy: &VmPolicy, query: &Query, name: &HostName, started: Instant) -> Answer {
        let kind = query.query_type();
        // Service bindings would lead past the gate: other ports and addresses, and keys that hide the name.
        let no_v6 = kind == RecordType::AAAA && self.entry.net.v6.is_none();
        if no_v6 || matches!(kind, RecordType::HTTPS | RecordType::SVCB) {
            return Answer::code(ResponseCode::NoError);
        }
        match self.shared.connector.dialer.resolve.records(name, kind).await {
            Ok(lookup) => self.admit(policy, &lookup, name, kind, started),
            Err(NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code, soa, .. }))) => {
                let code = match response_code {
                    ResponseCode::NXDomain | ResponseCode::NoError => response_code,
                    _ => ResponseCode::ServFail,
                };
                let authority = soa.map(|soa| soa.into_record_of_rdata()).into_iter().collect();
                Answer { authority, ..Answer::code(code) }
            }
            Err(error) => {
                tracing::debug!(%name, %error, "no answer from the resolvers");
                Answer::code(ResponseCode::ServFail)
                    .because(Info::NetworkError, "the daemon's resolvers did not answer".to_owned())
            }
        }
    }

    /// Leaves out what the guest could not reach anyway, and pins the rest before it is said.
    fn admit(
        &self,
        policy: &VmPolicy,
        lookup: &Lookup,
        name: &HostName,
        kind: RecordType,
        started: Instant,
    ) -> Answer {
        let dialer = &self.shared.connector.dialer;
        let now = Instant::now();
        let mut refused = 0;
        let mut records = Vec::new();
        let mut addresses = 0;
        for record in lookup.answers() {
            let address = match &record.data {
                RData::A(a) => Some(IpAddr::V4(a.0)),
                RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
                RData::HTTPS(_) | RData::SVCB(_) => continue,
                _ => None,
            };
            let mut record = record.clone();
            record.ttl = record.ttl.min(MAX_TTL);
            if let Some(address) = address {
                if dialer.admits(policy, address).is_err() {
                    refused += 1;
                    continue;
                }
                addresses += 1;
                self.entry.pins.pin(address, name, Duration::from_secs(record.ttl.into()), now);
            }
            records.push(record);
        }
        let asks_address = matches!(kind, RecordType::A | RecordType::AAAA);
        let answer = Answer { records, ..Answer::code(ResponseCode::NoError) };
        if refused > 0 && addresses == 0 && asks_address {
            let event = self.refuse(policy, Reason::Rebinding, Some(name), started);
            let text = format!("{name} leads only to addresses that no VM may reach (event {event})");
            return answer.because(Info::Filtered, text);
        }
        answer
    }
}

/// The types that are looked up. Zone transfers, `ANY`, `NULL` and whatever else is big or strange are not.
fn answered(kind: RecordType) -> bool {
    use RecordType as T;
    matches!(
        kind,
        T::A | T::AAAA
            | T::CNAME
            | T::MX
            | T::TXT
            | T::SRV
            | T::NS
            | T::SOA
            | T::CAA
            | T::PTR
            | T::NAPTR
            | T::TLSA
            | T::SSHFP
            | T::DS
            | T::DNSKEY
            | T::HTTPS
            | T::SVCB
    )
}

fn encode(request: &Message, answer: Answer, transport: Transport) -> Option<Vec<u8>> {
    let mut response = Message::response(request.metadata.id, request.metadata.op_code);
    response.metadata.recursion_desired = request.metadata.recursion_desired;
    response.metadata.checking_disabled = request.metadata.checking_disabled;
    response.metadata.recursion_available = true;
    response.metadata.response_code = answer.code;
    response.add_queries(request.queries.iter().take(1).cloned());
    response.add_answers(answer.records);
    response.add_authorities(answer.authority);
    if let Some(asked) = &request.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP).set_version(0).set_dnssec_ok(asked.flags().dnssec_ok);
        edns.set_rcode_high(answer.code.high());
        if let Some((info, text)) = answer.extended {
            let mut option = (info as u16).to_be_bytes().to_vec();
            option.extend_from_slice(text.as_bytes());
            edns.options_mut().insert(EdnsOption::Unknown(EXTENDED_ERROR, option));
        }
        response.set_edns(edns);
    }
    let bytes = response.to_vec().ok()?;
    let room = match transport {
        Transport::Tcp => usize::from(u16::MAX),
        Transport::Udp => {
            let asked = request.edns.as_ref().map_or(512, Edns::max_payload);
            usize::from(asked.clamp(512, MAX_UDP))
        }
    };
    if bytes.len() <= room { Some(bytes) } else { response.truncate().to_vec().ok() }
}
