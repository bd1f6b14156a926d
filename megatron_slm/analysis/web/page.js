"use strict";

/** Return the element with an id. */
const byId = (id) => document.getElementById(id);

/** Return a new element with a class and a text. */
function element(name, className = "", text = "") {
  const created = document.createElement(name);
  if (className) created.className = className;
  created.textContent = text;
  return created;
}

/** Switch between the light and the dark theme; the first one is the system's. */
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
