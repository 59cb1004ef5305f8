//! Keyset pages. A cursor names the last row seen by its sort key, so pages stay right while rows come and go.
//!
//! A cursor is authenticated together with the query that it continues (account, filters, sort, order): one that is
//! broken, forged, or from another query is refused.

use crate::error::{Result, StoreError};
use crate::seal::SealKey;
use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rusqlite::types::Value;
use rusqlite::{Connection, Row, params_from_iter};

/// The direction of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Smallest first.
    Asc,
    /// Largest first.
    #[default]
    Desc,
}

/// Which part of a list.
#[derive(Clone, Debug)]
pub struct PageRequest {
    /// Rows at most; at least 1.
    pub limit: u32,
    /// Where the page before ended.
    pub cursor: Option<String>,
    /// The direction.
    pub order: Order,
}

/// A part of a list.
#[derive(Clone, Debug)]
pub struct Page<T> {
    /// The rows.
    pub items: Vec<T>,
    /// Where to go on; `None` at the end.
    pub cursor: Option<String>,
}

impl<T> Page<T> {
    pub(crate) fn map<U>(self, change: impl FnMut(T) -> Result<U>) -> Result<Page<U>> {
        let items = self.items.into_iter().map(change).collect::<Result<_>>()?;
        Ok(Page { items, cursor: self.cursor })
    }
}

/// Signs and checks cursors.
#[derive(Clone)]
pub(crate) struct Cursors(hmac::Key);

const TAG: usize = 12;

impl Cursors {
    pub(crate) fn new(key: &SealKey) -> Self {
        Self(key.derive("cursor"))
    }

    fn tag(&self, scope: &str, body: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(&u64::try_from(scope.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(scope.as_bytes());
        context.update(body);
        context.sign()
    }

    /// The cursor after the row with this sort key and sequence number.
    pub(crate) fn encode(&self, scope: &str, key: &Value, seq: i64) -> Result<String> {
        let key = match key {
            Value::Integer(number) => serde_json::Value::from(*number),
            Value::Text(text) => serde_json::Value::from(text.as_str()),
            Value::Null | Value::Real(_) | Value::Blob(_) => serde_json::Value::Null,
        };
        let body = serde_json::to_vec(&(key, seq)).map_err(|e| StoreError::Internal(e.to_string()))?;
        let tag = self.tag(scope, &body);
        Ok(URL_SAFE_NO_PAD.encode([&tag.as_ref()[..TAG], &body].concat()))
    }

    /// Reads a cursor that [`Self::encode`] made for the same scope.
    pub(crate) fn decode(&self, scope: &str, cursor: &str) -> Result<(Value, i64)> {
        if cursor.len() > 4096 {
            return Err(StoreError::Cursor);
        }
        let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| StoreError::Cursor)?;
        let (tag, body) = bytes.split_at_checked(TAG).ok_or(StoreError::Cursor)?;
        let own = self.tag(scope, body);
        if aws_lc_rs::constant_time::verify_slices_are_equal(tag, &own.as_ref()[..TAG]).is_err() {
            return Err(StoreError::Cursor);
        }
        let (key, seq): (serde_json::Value, i64) =
            serde_json::from_slice(body).map_err(|_| StoreError::Cursor)?;
        let key = match key {
            serde_json::Value::String(text) => Value::Text(text),
            serde_json::Value::Number(number) => Value::Integer(number.as_i64().ok_or(StoreError::Cursor)?),
            _ => Value::Null,
        };
        Ok((key, seq))
    }
}

/// A list query being put together. Column names are ours, values are always bound.
pub(crate) struct Listing<'a> {
    pub(crate) select: &'a str,
    pub(crate) filters: Vec<(&'a str, Value)>,
    /// A NOT NULL column, or an expression over such.
    pub(crate) sort: &'a str,
    /// What the cursor is bound to besides sort and order.
    pub(crate) scope: String,
}

impl Listing<'_> {
    fn bound(&self, order: Order) -> String {
        format!("{}\0{}\0{order:?}", self.scope, self.sort)
    }

    /// The cursor that a page ending with this row would have.
    pub(crate) fn cursor_after(
        &self,
        cursors: &Cursors,
        order: Order,
        key: &Value,
        seq: i64,
    ) -> Result<String> {
        cursors.encode(&self.bound(order), key, seq)
    }

    /// Runs it. The select must begin with `seq`; the sort key is appended.
    pub(crate) fn run<T>(
        self,
        connection: &Connection,
        cursors: &Cursors,
        page: &PageRequest,
        read: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Page<T>> {
        let scope = self.bound(page.order);
        let Self { select, filters, sort, scope: _ } = self;
        let (direction, beyond) = match page.order {
            Order::Asc => ("ASC", ">"),
            Order::Desc => ("DESC", "<"),
        };
        let (columns, from) = select.split_once(" FROM ").unwrap_or((select, ""));
        let mut sql = format!("{columns}, {sort} AS sort_key FROM {from}");
        let mut values: Vec<Value> = Vec::with_capacity(filters.len() + 3);
        let mut glue = if from.contains(" WHERE ") { " AND " } else { " WHERE " };
        for (condition, value) in filters {
            sql.push_str(glue);
            sql.push_str(condition);
            glue = " AND ";
            if condition.contains('?') {
                values.push(value);
            }
        }
        if let Some(cursor) = &page.cursor {
            let (key, seq) = cursors.decode(&scope, cursor)?;
            sql.push_str(&format!("{glue}({sort}, seq) {beyond} (?, ?)"));
            values.extend([key, Value::Integer(seq)]);
        }
        let limit = i64::from(page.limit.max(1));
        sql.push_str(&format!(" ORDER BY {sort} {direction}, seq {direction} LIMIT ?"));
        values.push(Value::Integer(limit + 1));

        let mut statement = connection.prepare_cached(&sql)?;
        let mut rows = statement.query(params_from_iter(values))?;
        let (mut items, mut last, mut more) = (Vec::new(), None, false);
        while let Some(row) = rows.next()? {
            if i64::try_from(items.len()).unwrap_or(i64::MAX) == limit {
                more = true;
                break;
            }
            items.push(read(row)?);
            last = Some((row.get::<_, Value>("sort_key")?, row.get::<_, i64>("seq")?));
        }
        let cursor = match last {
            Some((key, seq)) if more => Some(cursors.encode(&scope, &key, seq)?),
            _ => None,
        };
        Ok(Page { items, cursor })
    }
}
