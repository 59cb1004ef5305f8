//! What the world's name server answers. Judges nobody; it is asked by the proxy alone.

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

/// Answers of the name server; addresses may change between questions.
#[derive(Clone, Default)]
pub struct Zone {
    pub records: Arc<Mutex<HashMap<String, Vec<Vec<IpAddr>>>>>,
    /// Names that only stand for others.
    aliases: Arc<Mutex<HashMap<String, String>>>,
    /// How long answers hold; 0 keeps them out of every cache.
    pub ttl: Arc<AtomicU32>,
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Zone {
    /// The name has these addresses.
    pub fn set(&self, name: &str, addresses: &[Ipv4Addr]) {
        let addresses = addresses.iter().map(|address| IpAddr::V4(*address)).collect();
        self.records.lock().unwrap().insert(name.to_owned(), vec![addresses]);
    }
    /// The name stands for another.
    pub fn alias(&self, name: &str, to: &str) {
        self.aliases.lock().unwrap().insert(name.to_owned(), to.to_owned());
    }

    /// The name has other addresses each time it is asked for; the last stay.
    pub fn turns(&self, name: &str, turns: &[Ipv4Addr]) {
        let turns = turns.iter().map(|address| vec![IpAddr::V4(*address)]).collect();
        self.records.lock().unwrap().insert(name.to_owned(), turns);
    }
    pub fn was_asked(&self, part: &str) -> bool {
        self.asked.lock().unwrap().iter().any(|name| name.contains(part))
    }

    pub fn answer(&self, request: &[u8]) -> Vec<u8> {
        let request = Message::from_vec(request).unwrap();
        let query = request.queries[0].clone();
        let name = query.name().to_ascii().to_lowercase();
        let name = name.trim_end_matches('.');
        self.asked.lock().unwrap().push(name.to_owned());
        let mut response = Message::response(request.metadata.id, request.metadata.op_code);
        response.metadata.recursion_available = true;
        response.add_query(query.clone());
        let ttl = self.ttl.load(Ordering::Relaxed);
        let mut name = name.to_owned();
        // As far as a name server goes along with it.
        for _ in 0..4 {
            let Some(to) = self.aliases.lock().unwrap().get(&name).cloned() else { break };
            let owner = Name::from_ascii(format!("{name}.")).unwrap();
            let alias = rdata::CNAME(Name::from_ascii(format!("{to}.")).unwrap());
            response.add_answer(Record::from_rdata(owner, ttl, RData::CNAME(alias)));
            name = to;
        }
        let name = name.as_str();
        let mut records = self.records.lock().unwrap();
        let Some(turns) = records.get_mut(name) else {
            response.metadata.response_code = ResponseCode::NXDomain;
            if ttl > 0 {
                let zone = Name::from_ascii("example.").unwrap();
                let soa = rdata::SOA::new(zone.clone(), zone.clone(), 1, 3600, 600, 86400, 300);
                response.add_authority(Record::from_rdata(zone, ttl, RData::SOA(soa)));
            }
            return response.to_vec().unwrap();
        };
        if query.query_type() == RecordType::AAAA {
            for address in &turns[0] {
                let IpAddr::V6(v6) = address else { continue };
                let owner = Name::from_ascii(format!("{name}.")).unwrap();
                response.add_answer(Record::from_rdata(owner, ttl, RData::AAAA(rdata::AAAA(*v6))));
            }
        } else if query.query_type() == RecordType::A {
            let addresses = if turns.len() > 1 { turns.remove(0) } else { turns[0].clone() };
            for address in addresses {
                let IpAddr::V4(v4) = address else { continue };
                let owner = Name::from_ascii(format!("{name}.")).unwrap();
                response.add_answer(Record::from_rdata(owner, ttl, RData::A(rdata::A(v4))));
            }
        } else if query.query_type() == RecordType::TXT {
            let text = RData::TXT(rdata::TXT::new(vec!["x".repeat(200); 4]));
            response.add_answer(Record::from_rdata(query.name().clone(), 60, text));
        }
        response.to_vec().unwrap()
    }
}
