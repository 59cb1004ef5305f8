//! A connection to an upstream that speaks HTTP: dialled, and over TLS verified for the one name that was decided on.

use super::{body::Body, http2::client, interim::Turn, received::Received};
use crate::{
    decide::Route,
    deny,
    dial::{DialError, Dialer},
    intercept::leaf::Alpn,
    socket::Socket,
    table::VmEntry,
    trust::Trust,
    window::Size,
};
use http::{HeaderMap, Request, Response};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, ClientConfig};
use rustls_pki_types::ServerName;
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tapgate_model::{HostName, Reason};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Longest head of an answer that is read whatever the VM's other connections hold.
const LEAST_HEAD: usize = 64 * 1024;

/// What an upstream connection is for; two requests share one only if all of this is the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The name that the certificate is verified for; `None` in clear text.
    pub tls: Option<HostName>,
    /// Where it was dialled.
    pub route: Route,
    /// The guest's destination: its port, and its address where the route is that address.
    pub to: SocketAddr,
    /// The best HTTP that was offered; what was chosen is the connection's own.
    pub offer: Alpn,
}

/// What an upstream is offered to speak.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Offer<'a> {
    /// HTTP, in this version or one before.
    Http(Alpn),
    /// The guest's own protocols; of none, nothing is said.
    Other(&'a [Vec<u8>]),
}

/// Why there is no upstream connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    /// Nothing was reached.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// TLS did not come about; the certificate, if it was that.
    #[error("{0}")]
    Tls(io::Error),
    /// HTTP did not come about, or broke.
    #[error("the upstream broke the connection: {0}")]
    Http(#[from] hyper::Error),
    /// The same of HTTP/2.
    #[error("the upstream broke the connection: {0}")]
    Http2(#[from] h2::Error),
}

impl UpstreamError {
    /// The alert that tells a guest whose TLS is not answered yet.
    pub(crate) fn alert(&self) -> &'static [u8] {
        let Self::Tls(error) = self else { return deny::alert_for(self.reason()) };
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)) => {
                deny::alert::NO_APPLICATION_PROTOCOL
            }
            _ => deny::alert_for(self.reason()),
        }
    }

    /// Whether the server said that it did not look at the request (RFC 9113 §8.7).
    pub(super) fn is_refusal(&self) -> bool {
        let Self::Http2(error) = self else { return false };
        error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
    }

    /// The word for the audit.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Dial(error) => error.reason(),
            Self::Http(_) | Self::Http2(_) => Reason::Unreachable,
            Self::Tls(error) => {
                let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
                match inner {
                    Some(rustls::Error::InvalidCertificate(_)) => Reason::Unverified,
                    _ => Reason::Unreachable,
                }
            }
        }
    }
}

/// Sends requests on one connection.
pub(crate) enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(client::Sender),
}

/// A connection with what it is for.
pub(crate) struct Upstream {
    pub key: Key,
    pub address: SocketAddr,
    pub sender: Sender,
}

impl Upstream {
    /// Whether it can take a request, waiting for the one before to end.
    pub(crate) async fn ready(&mut self) -> bool {
        match &mut self.sender {
            Sender::Http1(sender) => sender.ready().await.is_ok(),
            Sender::Http2(sender) => sender.is_open(),
        }
    }

    /// Whether it could take a request right now.
    pub(crate) fn at_rest(&self) -> bool {
        match &self.sender {
            Sender::Http1(sender) => sender.is_ready(),
            Sender::Http2(sender) => sender.is_open(),
        }
    }

    /// Another handle on a connection that takes many requests at a time.
    pub(crate) fn share(&self) -> Option<Self> {
        match &self.sender {
            Sender::Http1(_) => None,
            Sender::Http2(sender) => Some(Self {
                key: self.key.clone(),
                address: self.address,
                sender: Sender::Http2(sender.clone()),
            }),
        }
    }

    /// The protocol that was negotiated.
    pub(crate) fn alpn(&self) -> Alpn {
        match self.sender {
            Sender::Http1(_) => Alpn::Http1,
            Sender::Http2(_) => Alpn::Http2,
        }
    }

    /// Sends; gives the request back if none of it was sent. What comes before the answer goes out in its turn, if it has one.
    pub(super) async fn send(
        &mut self,
        mut request: Request<Body>,
        turn: Option<&Turn>,
    ) -> Result<Response<Received>, (UpstreamError, Option<Request<Body>>)> {
        match &mut self.sender {
            Sender::Http1(sender) => {
                if let Some(heard) = turn.map(Turn::heard) {
                    hyper::ext::on_informational(&mut request, move |head| {
                        heard.hear(head.status(), head.headers());
                    });
                }
                let sent = sender.try_send_request(request).await;
                sent.map(|answer| answer.map(Received::Http1)).map_err(|mut error| {
                    let message = error.take_message();
                    (error.into_error().into(), message)
                })
            }
            Sender::Http2(sender) => {
                let heard = turn.map(Turn::heard);
                let hear = |status, fields: &HeaderMap| {
                    if let Some(heard) = &heard {
                        heard.hear(status, fields);
                    }
                };
                // Apart, so that a request over HTTP/1 has no room for it.
                let sent = Box::pin(sender.send(request, hear)).await;
                sent.map(|answer| answer.map(Received::Http2))
                    .map_err(|(error, message)| (error.into(), message))
            }
        }
    }
}

/// Makes upstream connections.
pub(crate) struct Connector {
    pub(crate) dialer: Dialer,
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
    other: Arc<ClientConfig>,
    patience: Duration,
}

impl Connector {
    /// Certificates are always verified.
    pub(crate) fn new(dialer: Dialer, trust: &Trust, patience: Duration) -> Result<Self, rustls::Error> {
        let config = |alpn: &[Alpn]| {
            let words: Vec<&[u8]> = alpn.iter().map(|alpn| alpn.word()).collect();
            trust.client(&words).map(Arc::new)
        };
        Ok(Self {
            dialer,
            http1: config(&[Alpn::Http1])?,
            http2: config(&[Alpn::Http2, Alpn::Http1])?,
            other: config(&[])?,
            patience,
        })
    }

    /// TLS to the upstream, verified for the name.
    pub(crate) async fn tls(
        &self,
        stream: Socket,
        name: &HostName,
        offer: Offer<'_>,
    ) -> Result<TlsStream<Socket>, UpstreamError> {
        let config = match offer {
            Offer::Http(Alpn::Http1) => self.http1.clone(),
            Offer::Http(Alpn::Http2) => self.http2.clone(),
            Offer::Other([]) => self.other.clone(),
            Offer::Other(protocols) => {
                let mut config = ClientConfig::clone(&self.other);
                config.alpn_protocols = protocols.to_vec();
                Arc::new(config)
            }
        };
        let name = ServerName::try_from(name.as_str().to_owned());
        let name = name.map_err(|error| UpstreamError::Tls(io::Error::other(error)))?;
        let handshake = TlsConnector::from(config).connect(name, stream);
        match tokio::time::timeout(self.patience, handshake).await {
            Ok(done) => done.map_err(UpstreamError::Tls),
            Err(_) => Err(UpstreamError::Tls(io::ErrorKind::TimedOut.into())),
        }
    }

    /// Dials, verifies, and begins HTTP in what was negotiated; in clear text, in what is offered.
    pub(crate) async fn connect(&self, entry: &VmEntry, key: Key) -> Result<Upstream, UpstreamError> {
        let (mut stream, address) = self.dialer.dial(entry, &key.route, key.to).await?;
        let size = stream.open(&entry.upstream_windows);
        let sender = match &key.tls {
            None => begin(stream, size, key.offer).await?,
            Some(name) => {
                let stream = self.tls(stream, name, Offer::Http(key.offer)).await?;
                let http2 = stream.get_ref().1.alpn_protocol() == Some(Alpn::Http2.word());
                begin(stream, size, if http2 { Alpn::Http2 } else { Alpn::Http1 }).await?
            }
        };
        Ok(Upstream { key, address, sender })
    }
}

async fn begin<S>(stream: S, size: Size, alpn: Alpn) -> Result<Sender, UpstreamError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match alpn {
        Alpn::Http1 => {
            let (sender, connection) = http1::Builder::new()
                .preserve_header_case(true)
                .max_buf_size(size.of_buffer(LEAST_HEAD))
                .handshake(TokioIo::new(stream))
                .await?;
            tokio::spawn(connection.with_upgrades());
            Ok(Sender::Http1(sender))
        }
        Alpn::Http2 => Ok(Sender::Http2(client::begin(stream, size).await?)),
    }
}

impl Key {
    /// Where a name is dialled, only the port of the guest's destination counts.
    pub(crate) fn new(tls: Option<HostName>, route: Route, to: SocketAddr, offer: Alpn) -> Self {
        let to = match route {
            Route::Name(_) => SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), to.port()),
            Route::Address => to,
        };
        Self { tls, route, to, offer }
    }
}
