//! Every filter of every list, alone and together, in every order, and page by page: what a look at the whole list would give.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{PUBLIC_KEY, TestApp};
use serde_json::{Value, json};
use tapgate_model::StatusDetail as S;

/// A list: where, its filters with the values to try, and what it sorts by; the first is the default.
struct List<'a> {
    path: &'a str,
    filters: &'a [(&'a str, &'a [&'a str])],
    sorts: &'a [&'a str],
}

fn items(page: &Value) -> Vec<Value> {
    page["data"].as_array().unwrap().clone()
}

/// All pages of two.
async fn walk(app: &TestApp, key: &str, path: &str) -> Vec<Value> {
    let (mut all, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = app.get(key, &format!("{path}{cursor}")).await.is(200);
        all.extend(items(&page));
        match page["cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return all,
        }
        assert_eq!((page["has_more"].as_bool(), items(&page).len()), (Some(true), 2), "{path}");
    }
}

impl List<'_> {
    /// Every choice of filters: `None` and each value of each.
    fn choices(&self) -> Vec<Vec<(&str, &str)>> {
        let mut choices = vec![Vec::new()];
        for (name, values) in self.filters {
            let with = |choice: &Vec<_>| {
                let more = values.iter().map(|value| [choice.as_slice(), &[(*name, *value)]].concat());
                more.collect::<Vec<_>>()
            };
            let longer: Vec<_> = choices.iter().flat_map(with).collect();
            choices.extend(longer);
        }
        choices
    }

    /// Answers how many choices found something.
    async fn check(&self, app: &TestApp, key: &str) -> usize {
        let whole = items(&app.get(key, &format!("{}?limit=100", self.path)).await.is(200));
        let mut found = 0;
        for choice in self.choices() {
            let fits = |item: &&Value| choice.iter().all(|(name, value)| item[*name] == *value);
            let wanted: Vec<Value> = whole.iter().filter(fits).cloned().collect();
            found += usize::from(!wanted.is_empty());
            let query: String = choice.iter().map(|(name, value)| format!("&{name}={value}")).collect();
            for sort in self.sorts {
                for order in ["", "asc", "desc"] {
                    let mut wanted = wanted.clone();
                    // The whole list is newest first; those of one moment stay in the order of creation.
                    wanted.reverse();
                    wanted.sort_by(|a, b| a[*sort].as_str().cmp(&b[*sort].as_str()));
                    if order != "asc" {
                        wanted.reverse();
                    }
                    let mut path = format!("{}?limit=2{query}", self.path);
                    // Left out where it is the default.
                    if *sort != self.sorts[0] || order == "asc" {
                        path += &format!("&sort={sort}");
                    }
                    if !order.is_empty() {
                        path += &format!("&order={order}");
                    }
                    assert_eq!(walk(app, key, &path).await, wanted, "{path}");
                }
            }
        }
        found
    }
}

#[tokio::test]
async fn vms_by_every_filter_in_every_order() {
    let app = TestApp::new();
    let (key, other) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    app.vm(&other, "b").await;
    let states: [(&str, &[S]); 5] = [
        ("c", &[]),
        ("a", &[S::Starting, S::Running, S::Ready]),
        ("e", &[S::Starting, S::Running]),
        ("b", &[S::Failed]),
        ("d", &[S::Starting]),
    ];
    for (name, states) in states {
        let vm = app.vm(&key, name).await;
        for state in states {
            app.advance(&vm, *state).await;
        }
    }
    let list = List {
        path: "/v1/vms",
        filters: &[
            ("status", &["pending", "running", "stopped", "destroyed", "failed"]),
            (
                "status_detail",
                &[
                    "queued",
                    "creating",
                    "starting",
                    "running",
                    "ready",
                    "stopping",
                    "stopped",
                    "destroying",
                    "destroyed",
                    "failed",
                ],
            ),
            ("name", &["a", "c", "nobody"]),
        ],
        sorts: &["created_at", "updated_at", "name"],
    };
    // The choices that fit some of the five: by status 3, by detail 5, both 5, by name 2 and the same three again.
    assert_eq!(list.check(&app, &key).await, 1 + 3 + 5 + 5 + 2 * 4);
}

#[tokio::test]
async fn rules_secrets_and_agents_by_every_filter_in_every_order() {
    let app = TestApp::new();
    let (key, other) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    let vm = app.vm(&key, "vm").await;
    let of_vm = format!("/v1/vms/{vm}/egress/rules");
    for (at, suffix) in [("/v1/egress/rules", ""), (of_vm.as_str(), "-vm")] {
        for (name, field, target) in [
            ("b", "host", "b.example"),
            ("n", "cidr", "192.0.2.0/24"),
            ("a", "host", "*.example"),
            ("m", "cidr", "198.51.100.0/24"),
            ("c", "host", "a.example"),
        ] {
            app.post(&key, at, json!({ "name": format!("{name}{suffix}"), field: target })).await.is(201);
        }
        let names = [format!("a{suffix}"), format!("n{suffix}")];
        let list = List {
            path: at,
            filters: &[
                ("host", &["a.example", "*.example", "c.example"]),
                ("cidr", &["192.0.2.0/24", "192.0.2.0/25"]),
                ("name", &[&names[0], &names[1]]),
            ],
            sorts: &["created_at", "host"],
        };
        assert_eq!(list.check(&app, &key).await, 1 + 2 + 1 + 2 + 2);
    }
    app.post(&other, "/v1/secrets", json!({ "name": "a", "secret": "v", "env_var": "A" })).await.is(201);
    for name in ["c", "a", "b"] {
        let body = json!({ "name": name, "secret": "v", "env_var": name.to_uppercase() });
        app.post(&key, "/v1/secrets", body).await.is(201);
        app.call(&key, "PUT", &format!("/v1/env/{}", name.to_uppercase()), Some(json!({ "value": "v" })))
            .await
            .is(200);
        let body = json!({ "name": name, "repo": "o/r", "prompt": "p", "public_key": PUBLIC_KEY });
        app.post(&key, "/v1/agents", body).await.is(201);
    }
    let secrets =
        List { path: "/v1/secrets", filters: &[("name", &["a", "x"])], sorts: &["created_at", "name"] };
    assert_eq!(secrets.check(&app, &key).await, 2);
    // These two have one order.
    for name in ["", "&name=a", "&name=x"] {
        for status in ["", "&status=provisioning", "&status=idle", "&status=running"] {
            let found = walk(&app, &key, &format!("/v1/agents?limit=2{name}{status}")).await;
            let names: Vec<&str> = found.iter().map(|agent| agent["name"].as_str().unwrap()).collect();
            let wanted: &[&str] = match (name, status) {
                ("", "" | "&status=provisioning") => &["b", "a", "c"],
                ("&name=a", "" | "&status=provisioning") => &["a"],
                _ => &[],
            };
            assert_eq!(names, wanted, "{name} {status}");
        }
    }
    let env = walk(&app, &key, "/v1/env?limit=2").await;
    assert_eq!(env.iter().map(|one| one["key"].as_str().unwrap()).collect::<Vec<_>>(), ["A", "B", "C"]);
}
