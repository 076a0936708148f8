// Lists the routes of openapi.json; needs no network but the service.
"use strict";

for (const box of document.querySelectorAll(".origin")) box.textContent = location.origin;

function add(parent, tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  parent.append(made);
  return made;
}

function routes(description) {
  const groups = new Map();
  for (const [path, verbs] of Object.entries(description.paths)) {
    for (const [verb, route] of Object.entries(verbs)) {
      const group = (route.tags || ["More"])[0];
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push({ path, verb, route });
    }
  }
  return groups;
}

fetch("/openapi.json").then((answer) => answer.json()).then((description) => {
  const place = document.getElementById("paths");
  for (const [group, list] of routes(description)) {
    add(place, "h2", group);
    for (const { path, verb, route } of list) {
      const box = add(place, "details", "");
      const title = add(box, "summary", "");
      add(title, "code", `${verb.toUpperCase()} ${path}`);
      add(box, "p", route.description || route.summary);
      const options = (route.parameters || []).map((p) => `${p.name} (${p.in}): ${p.description || ""}`);
      if (options.length) {
        const items = add(box, "ul", "");
        for (const option of options) add(items, "li", option);
      }
      const bodies = Object.keys(route.requestBody?.content || {});
      if (bodies.length) add(box, "p", `Body: ${bodies.join(", ")}`);
      const answers = Object.entries(route.responses || {});
      add(box, "p", answers.map(([status, { description: text }]) => `${status} ${text}`).join("; "));
    }
  }
});
