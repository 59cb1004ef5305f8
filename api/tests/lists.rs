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

/// A cursor of each list, taken to each other one, to other filters, another sort, another order and another account.
#[tokio::test]
async fn a_cursor_is_good_for_its_own_list_alone() {
    let mut app = TestApp::new();
    app.puts_in_force();
    let (key, other) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    let mut of_vms = Vec::new();
    for name in ["a", "b"] {
        let vm = app.vm(&key, name).await;
        app.make_ready(&vm).await;
        let of_vm = format!("/v1/vms/{vm}/egress/rules");
        for at in ["/v1/egress/rules", &of_vm, &of_vm] {
            app.post(&key, at, json!({ "host": "a.example" })).await.is(201);
        }
        for _ in 0..2 {
            app.post(&key, &format!("/v1/vms/{vm}/snapshots"), json!({})).await.is(201);
        }
        let body = json!({ "name": name, "secret": "v", "env_var": name.to_uppercase() });
        app.post(&key, "/v1/secrets", body).await.is(201);
        let path = format!("/v1/env/{}", name.to_uppercase());
        app.call(&key, "PUT", &path, Some(json!({ "value": "v" }))).await.is(200);
        app.post(&key, "/v1/agents", json!({ "name": name, "repo": "o/r", "prompt": "p" })).await.is(201);
        of_vms.push(vm);
    }
    let vm = |n: usize, list: &str| format!("/v1/vms/{}/{list}", of_vms[n]);
    let lists = [
        (
            "/v1/vms".to_owned(),
            &["status=running", "status_detail=ready", "name=a", "sort=name", "order=asc"][..],
        ),
        (
            "/v1/egress/rules".to_owned(),
            &["host=a.example", "name=x", "cidr=192.0.2.0/24", "sort=host", "order=asc"],
        ),
        (vm(0, "egress/rules"), &["host=a.example", "name=x", "cidr=192.0.2.0/24", "sort=host", "order=asc"]),
        (vm(1, "egress/rules"), &[]),
        ("/v1/secrets".to_owned(), &["name=a", "sort=name", "order=asc"]),
        ("/v1/snapshots".to_owned(), &[]),
        (vm(0, "snapshots"), &[]),
        (vm(1, "snapshots"), &[]),
        ("/v1/env".to_owned(), &[]),
        ("/v1/agents".to_owned(), &["status=provisioning", "name=a"]),
        ("/v1/audit/egress".to_owned(), &[]),
    ];
    for (path, changes) in &lists {
        if path == "/v1/audit/egress" {
            continue;
        }
        let page = app.get(&key, &format!("{path}?limit=1")).await.is(200);
        let cursor = page["cursor"].as_str().unwrap_or_else(|| panic!("{path} has one page"));
        app.get(&key, &format!("{path}?limit=2&cursor={cursor}")).await.is(200);
        let refused = async |token: &str, at: String| {
            assert_eq!(app.get(token, &at).await.error(400), "invalid_cursor", "{path} to {at}");
        };
        for change in *changes {
            refused(&key, format!("{path}?{change}&cursor={cursor}")).await;
        }
        for (at, _) in lists.iter().filter(|(at, _)| at != path) {
            refused(&key, format!("{at}?cursor={cursor}")).await;
        }
        if !path.contains("vm_") {
            refused(&other, format!("{path}?cursor={cursor}")).await;
        }
        for cut in [&cursor[1..], &cursor[..cursor.len() - 1], "AAAA", &format!("{cursor}A")] {
            refused(&key, format!("{path}?cursor={cut}")).await;
        }
    }
}
